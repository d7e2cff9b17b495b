// Package stack tests the shipped docker-compose.yaml and Dockerfile: it starts
// the whole deployment and lets it complete a run. It has only tests. They need
// the worker's image and the build tag stack: run `make test-stack`.
package stack

// Package stack tests the shipped docker-compose.yaml and Dockerfile: the whole
// deployment comes up and carries a run through. It has tests only, behind the
// build tag stack, since they need the worker's image: run `make test-stack`.
package stack

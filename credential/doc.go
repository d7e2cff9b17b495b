// Package credential reads credentials from where an operator keeps them: a variable, a
// file that docker or kubernetes mounts, or a program such as pass, op or vault.
//
// It owns the sources and the reading. What a credential is good for is checked by
// package tasks/speckit, and whoever uses one says so in its own package.
//
//   - A credential is read each time it is used, so that a new one counts without a
//     restart.
//   - It is held as a [secret.String], which prints as three asterisks.
//   - Every redactor of the process knows it before the caller does.
//   - Errors name the credential and its source, and never have a part of its value.
package credential

// Package database connects to PostgreSQL as an address of SQLAlchemy or of a Celery
// result backend says, with all options of libpq. It classifies the driver's
// errors, and repeats calls while the server restarts or fails over. It contains no
// SQL of any application.
package database

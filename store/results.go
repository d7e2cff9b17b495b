package store

import (
	"context"
	"errors"

	"github.com/moonladderstudios/mm-orchestrator/protocol"
	"github.com/moonladderstudios/mm-orchestrator/results/postgres"
)

// ResultsConfig says where and how Celery results are stored. Its fields URL,
// KeepTables, ApplicationName, Connections and those about time are not used: they
// are the store's.
type ResultsConfig = postgres.Config

// Results is Celery's result backend in the database of a [Store]: a
// [postgres.Backend] that shares the store's connections.
type Results struct {
	*postgres.Backend
	store  *Store
	config ResultsConfig
}

// NewResults returns the result backend in the database of store. It does not access
// the database yet.
func NewResults(store *Store, config ResultsConfig) (*Results, error) {
	config = config.WithDefaults()
	if err := config.Validate(); err != nil {
		return nil, err
	}
	config.TryTimeout, config.RetryFor = store.config.TryTimeout, store.config.RetryFor
	if config.RetryFor == 0 {
		config.RetryFor = -1
	}
	backend, err := postgres.New(store.pool, config)
	if err != nil {
		return nil, err
	}
	return &Results{backend, store, config}, nil
}

// Store is that of [postgres.Backend]; an error about a missing table says what to
// do.
func (r *Results) Store(ctx context.Context, results ...protocol.Result) (written []bool, err error) {
	written, err = r.Backend.Store(ctx, results...)
	if errors.Is(err, ErrSchema) {
		err = withCure(err)
	}
	return written, err
}

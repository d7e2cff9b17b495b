package client_test

import "testing"

// BenchmarkSend measures one goroutine, which waits for each confirm, and many.
func BenchmarkSend(b *testing.B) {
	env := newTestEnv(b, nil)
	b.Run("one", func(b *testing.B) {
		for b.Loop() {
			if _, err := env.client.Send(b.Context(), add(1, 2)); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("many", func(b *testing.B) {
		b.SetParallelism(32)
		b.RunParallel(func(pb *testing.PB) {
			for pb.Next() {
				if _, err := env.client.Send(b.Context(), add(1, 2)); err != nil {
					b.Error(err)
					return
				}
			}
		})
	})
}

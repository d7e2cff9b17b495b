package amqp

import (
	"errors"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"
)

// unackedMessages is a broker's side of a channel.
type unackedMessages struct {
	mu      sync.Mutex
	tags    map[uint64]bool
	acked   map[uint64]bool
	frames  int
	refused error
}

func (u *unackedMessages) ack(tag uint64, multiple bool) error {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.frames++
	if !u.tags[tag] {
		u.refused = errors.New("unknown delivery tag")
		return u.refused
	}
	for other := range u.tags {
		if other == tag || multiple && other < tag {
			delete(u.tags, other)
			u.acked[other] = true
		}
	}
	return nil
}

func (u *unackedMessages) requeue(tag uint64) {
	u.mu.Lock()
	defer u.mu.Unlock()
	delete(u.tags, tag)
}

func newAcks(u *unackedMessages) *acks {
	return &acks{write: u.ack, hold: func() {}, release: func() error { return nil }}
}

// An acknowledgement of several deliveries must not include one that is not settled, or
// that is requeued, in whatever order the deliveries arrive and are settled.
func TestAcknowledgementsTogetherAreThoseThatAreDue(t *testing.T) {
	t.Parallel()
	for seed := range uint64(300) {
		random := rand.New(rand.NewPCG(seed, 1))
		const deliveries = 60
		u := &unackedMessages{tags: map[uint64]bool{}, acked: map[uint64]bool{}}
		for tag := range uint64(deliveries) {
			u.tags[tag+1] = true
		}
		a := newAcks(u)
		// Two consumers, each with its own deliveries in order, and goroutines that settle
		// them.
		var consumers, handlers sync.WaitGroup
		fate := make([]int, deliveries+1) // 0: unsettled in the end, 1: requeued, else acknowledged
		both := [2][]uint64{}
		for tag := uint64(1); tag <= deliveries; tag++ {
			fate[tag] = random.IntN(12)
			n := random.IntN(2)
			both[n] = append(both[n], tag)
		}
		for _, tags := range both {
			consumers.Go(func() {
				for _, tag := range tags {
					r := &receipt{tag: tag}
					a.add(r)
					handlers.Go(func() {
						switch fate[tag] {
						case 0:
						case 1:
							u.requeue(tag)
							a.settled(r)
						default:
							if err := a.ack(r); err != nil {
								t.Error(err)
							}
						}
					})
				}
			})
		}
		consumers.Wait()
		handlers.Wait()
		for tag := uint64(1); tag <= deliveries; tag++ {
			if want := fate[tag] > 1; u.acked[tag] != want {
				t.Fatalf("seed %d: delivery %d: acknowledged is %t", seed, tag, u.acked[tag])
			}
			if want := fate[tag] == 0; u.tags[tag] != want {
				t.Fatalf("seed %d: delivery %d: unsettled is %t", seed, tag, u.tags[tag])
			}
		}
	}
}

func TestFramesOfAcknowledgements(t *testing.T) {
	t.Parallel()
	type frame struct {
		tag      uint64
		multiple bool
	}
	for name, tt := range map[string]struct {
		received, open, due []uint64
		want                []frame
	}{
		"one":                        {[]uint64{1, 2}, []uint64{2}, []uint64{1}, []frame{{1, false}}},
		"all":                        {[]uint64{1, 2, 3}, nil, []uint64{3, 1, 2}, []frame{{3, true}}},
		"up to an unsettled one":     {[]uint64{1, 2, 3, 4}, []uint64{3}, []uint64{1, 2, 4}, []frame{{2, true}, {4, false}}},
		"one before an unsettled":    {[]uint64{1, 2, 3}, []uint64{2}, []uint64{1, 3}, []frame{{1, false}, {3, false}}},
		"an earlier one is missing":  {[]uint64{1, 3, 4}, nil, []uint64{1, 3, 4}, []frame{{1, false}, {3, false}, {4, false}}},
		"the missing one is there":   {[]uint64{3, 1, 2}, []uint64{1}, []uint64{2, 3}, []frame{{2, false}, {3, false}}},
		"settled ones do not matter": {[]uint64{1, 2, 3, 4, 5}, []uint64{5}, []uint64{2, 4}, []frame{{4, true}}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var got []frame
			held := 0
			a := &acks{
				write:   func(tag uint64, multiple bool) error { got = append(got, frame{tag, multiple}); return nil },
				hold:    func() { held++ },
				release: func() error { held--; return nil },
			}
			for _, tag := range tt.received {
				r := &receipt{tag: tag}
				a.add(r)
				if !slices.Contains(tt.open, tag) {
					a.settled(r)
				}
			}
			a.due = tt.due
			tags, upTo, _ := a.take()
			if err := a.writeAll(tags, upTo); err != nil || held != 0 {
				t.Error(err, held)
			}
			if !slices.Equal(got, tt.want) {
				t.Errorf("got %v, want %v", got, tt.want)
			}
		})
	}
}

func TestAcknowledgementAfterAFailureToWrite(t *testing.T) {
	t.Parallel()
	broken := errors.New("broken")
	a := &acks{write: func(uint64, bool) error { return broken }, hold: func() {}, release: func() error { return nil }}
	for tag := uint64(1); tag <= 2; tag++ {
		r := &receipt{tag: tag}
		a.add(r)
		if err := a.ack(r); !errors.Is(err, broken) {
			t.Errorf("acknowledgement %d: %v", tag, err)
		}
	}
}

// BenchmarkAcks settles deliveries in their order by several goroutines.
func BenchmarkAcks(b *testing.B) {
	u := &unackedMessages{}
	a := &acks{write: func(uint64, bool) error { u.frames++; return nil }, hold: func() {}, release: func() error { return nil }}
	var tags sync.Mutex
	var tag uint64
	b.ReportAllocs()
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			tags.Lock()
			tag++
			r := &receipt{tag: tag}
			a.add(r)
			tags.Unlock()
			if err := a.ack(r); err != nil {
				b.Error(err)
			}
		}
	})
}

package routing

import (
	"context"
	"runtime"
	"strconv"
	"sync"
	"testing"
	"unsafe"
)

type nothing struct{}

func (nothing) Receive(*Actor, *Message) error { return nil }
func (nothing) Drained(*Actor) error           { return nil }

func TestRecordsStaySmall(t *testing.T) {
	if n := unsafe.Sizeof(Actor{}); n > 112 {
		t.Errorf("an actor's record takes %d bytes, promised are 112", n)
	}
	if n := unsafe.Sizeof(Message{}); n > overhead {
		t.Errorf("a message's record takes %d bytes, charged are %d", n, overhead)
	}
}

// idle spawns count actors, calls each once, and returns the heap bytes and goroutines they own when idle again.
func idle(t testing.TB, n *Node, count int) (bytes float64, goroutines int) {
	heap := func() uint64 {
		var m runtime.MemStats
		runtime.GC()
		runtime.GC() // twice: what the first one frees of pools is gone after the second
		runtime.ReadMemStats(&m)
		return m.HeapAlloc
	}
	all := make([]Address, count)
	before, others := heap(), runtime.NumGoroutine()
	for i := range all {
		a, err := n.Spawn("", echo, nil)
		if err != nil {
			t.Fatal(err)
		}
		all[i] = a.Address()
	}
	for _, at := range all {
		r, _ := NewRoute(at)
		if _, err := n.Call(t.Context(), &Message{Onward: r}); err != nil {
			t.Fatal(err)
		}
	}
	for runtime.NumGoroutine() > others { // the last answer is out before its actor's turn is over
		runtime.Gosched()
	}
	return float64(heap()-before) / float64(count), runtime.NumGoroutine() - others
}

func TestIdleActorsOwnNoGoroutineAndLittleMemory(t *testing.T) {
	const count = 100_000
	var n Node
	defer n.Close()
	bytes, goroutines := idle(t, &n, count)
	t.Logf("%.0f bytes an idle actor", bytes)
	if bytes > 256 {
		t.Errorf("%.0f bytes an idle actor, promised are 256", bytes)
	}
	if goroutines != 0 || n.Len() != count {
		t.Errorf("%d actors own %d goroutines", n.Len(), goroutines)
	}
}

func TestInlineRunAllocatesNothing(t *testing.T) {
	var n Node
	defer n.Close()
	a := spawn(t, &n, "a", nothing{}, nil)
	if got := testing.AllocsPerRun(1000, a.Run); got != 0 {
		t.Errorf("Run of an idle actor allocates %v times", got)
	}
}

func TestWakeOfBusyActorAllocatesNothing(t *testing.T) {
	var n Node
	hold := make(chan struct{})
	a := spawn(t, &n, "a", &probe{drained: func(*Actor) error { <-hold; return nil }}, nil)
	a.Wake()
	for name, f := range map[string]func(){"Wake": a.Wake, "Run": a.Run} {
		if got := testing.AllocsPerRun(1000, f); got != 0 {
			t.Errorf("%s of a busy actor allocates %v times", name, got)
		}
	}
	close(hold)
	n.Close()
}

func TestPostToBusyActorAllocatesNothing(t *testing.T) {
	const runs = 1000
	var n Node
	hold := make(chan struct{})
	spawn(t, &n, "a", WorkerFunc(func(*Actor, *Message) error { <-hold; return nil }), &Options{Limit: 1 << 20})
	self := spawn(t, &n, "self", nothing{}, nil)
	r := route(t, "a")
	messages := make([]Message, runs+2)
	if err := self.Post(&Message{Onward: r}); err != nil {
		t.Fatal(err)
	}
	i := 0
	if got := testing.AllocsPerRun(runs, func() {
		messages[i].Onward = r
		if err := self.Post(&messages[i]); err != nil {
			t.Fatal(err)
		}
		i++
	}); got != 0 {
		t.Errorf("Post allocates %v times", got)
	}
	close(hold)
	n.Close()
}

func BenchmarkIdleActor(b *testing.B) {
	for b.Loop() {
		var n Node
		bytes, goroutines := idle(b, &n, 100_000)
		b.ReportMetric(bytes, "B/actor")
		b.ReportMetric(float64(goroutines), "goroutines")
		n.Close()
	}
}

func BenchmarkSpawnStop(b *testing.B) {
	var n Node
	b.ReportAllocs()
	for b.Loop() {
		a, err := n.Spawn("", nothing{}, nil)
		if err != nil {
			b.Fatal(err)
		}
		a.Stop(nil)
	}
	n.Close()
}

func BenchmarkMessageToBusy(b *testing.B) {
	var n Node
	r := route(b, "a")
	spawn(b, &n, "a", nothing{}, &Options{Limit: 1 << 20})
	b.ReportAllocs()
	for b.Loop() {
		if err := n.Send(context.Background(), &Message{Onward: r}); err != nil {
			b.Fatal(err)
		}
	}
	n.Close()
}

// BenchmarkMessageToIdle is a message, the start of a goroutine, and the way back to whoever waits for it.
func BenchmarkMessageToIdle(b *testing.B) {
	var n Node
	r := route(b, "a")
	done := make(chan struct{})
	spawn(b, &n, "a", WorkerFunc(func(*Actor, *Message) error { done <- struct{}{}; return nil }), nil)
	b.ReportAllocs()
	for b.Loop() {
		if err := n.Post(&Message{Onward: r}); err != nil {
			b.Fatal(err)
		}
		<-done
	}
	n.Close()
}

func BenchmarkWakeIdle(b *testing.B) {
	var n Node
	done := make(chan struct{})
	a := spawn(b, &n, "a", &probe{drained: func(*Actor) error { done <- struct{}{}; return nil }}, nil)
	b.ReportAllocs()
	for b.Loop() {
		a.Wake()
		<-done
	}
	n.Close()
}

func BenchmarkWakeBusy(b *testing.B) {
	var n Node
	hold := make(chan struct{})
	a := spawn(b, &n, "a", &probe{drained: func(*Actor) error { <-hold; return nil }}, nil)
	a.Wake()
	b.ReportAllocs()
	for b.Loop() {
		a.Wake()
	}
	close(hold)
	n.Close()
}

func BenchmarkRunInline(b *testing.B) {
	var n Node
	a := spawn(b, &n, "a", nothing{}, nil)
	b.ReportAllocs()
	for b.Loop() {
		a.Run()
	}
	n.Close()
}

// BenchmarkRunShared is several goroutines with one actor, as streams with one sealer.
func BenchmarkRunShared(b *testing.B) {
	for _, goroutines := range []int{2, 16} {
		b.Run(strconv.Itoa(goroutines), func(b *testing.B) {
			var n Node
			var mu sync.Mutex
			queued, sealed := 0, 0
			a := spawn(b, &n, "a", &probe{drained: func(*Actor) error {
				mu.Lock()
				sealed, queued = sealed+queued, 0
				mu.Unlock()
				return nil
			}}, nil)
			b.ReportAllocs()
			var wg sync.WaitGroup
			for range goroutines {
				wg.Go(func() {
					for range b.N / goroutines {
						mu.Lock()
						queued++
						mu.Unlock()
						a.Run()
					}
				})
			}
			wg.Wait()
			n.Close()
			if want := b.N / goroutines * goroutines; sealed != want {
				b.Fatalf("sealed %d of %d", sealed, want)
			}
		})
	}
}

func BenchmarkCall(b *testing.B) {
	var n Node
	r := route(b, "echo")
	spawn(b, &n, "echo", echo, nil)
	b.ReportAllocs()
	for b.Loop() {
		if _, err := n.Call(context.Background(), &Message{Onward: r}); err != nil {
			b.Fatal(err)
		}
	}
	n.Close()
}

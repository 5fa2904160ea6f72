package relay

// Forward moves what comes from one connection to the other until its end.
var Forward = forward

// A PipePool is a pool of a test's own.
type PipePool = pipePool

// Count is how many pipes it has.
func (l *pipePool) Count() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.open
}

// Use has n pipes at once.
func (l *pipePool) Use(n int) { l.take(n)() }

func (l *pipePool) take(n int) (giveBack func()) {
	var all []*pipe
	for range n {
		if p := l.get(); p != nil {
			all = append(all, p)
		}
	}
	return func() {
		for _, p := range all {
			l.put(p)
		}
	}
}

// Pipes is how many the process has.
func Pipes() int { return pipes.Count() }

// SweepPipes closes those that nobody needed since it was last called, and says how many are left.
func SweepPipes() int {
	pipes.mu.Lock()
	defer pipes.mu.Unlock()
	pipes.sweep()
	return pipes.open
}

// WithoutPipes runs f when there are no more to be had: somebody else has them.
func WithoutPipes(f func()) {
	defer pipes.take(MaxPipes)()
	f()
}

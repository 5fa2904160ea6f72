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
func (l *pipePool) Use(n int) {
	for range n {
		defer l.put(l.get())
	}
}

// Pipes is how many the process has.
func Pipes() int { return pipes.Count() }

// WithoutPipes runs f when there are no more to be had, and none idle.
func WithoutPipes(f func()) {
	pipes.mu.Lock()
	open, idle := pipes.open, pipes.idle
	pipes.open, pipes.idle, pipes.unneeded = MaxPipes, nil, 0
	pipes.mu.Unlock()
	f()
	pipes.mu.Lock()
	defer pipes.mu.Unlock()
	pipes.open, pipes.idle = open, idle
}

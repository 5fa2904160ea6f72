package relay

// Forward moves what comes from one connection to the other until its end.
var Forward = forward

// Pipes is how many there are, in use or in the pool.
func Pipes() int { return MaxPipes - int(pipeLeft.Load()) }

// WithoutPipes runs f when there are no more to be had.
func WithoutPipes(f func()) {
	left := pipeLeft.Swap(0)
	f()
	pipeLeft.Add(left)
}

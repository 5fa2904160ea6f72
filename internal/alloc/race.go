//go:build race

package alloc

// Raced says whether the race detector is in: it makes everything some ten times slower and empties
// pools at random. make plain runs what it makes too slow, or hides, without it.
const Raced = true

//go:build !race

package alloc

// Raced says whether the race detector is in.
const Raced = false

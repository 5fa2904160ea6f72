//go:build race

package alloc

// raced: the detector makes Hostile ten times slower and empties pools at random. make plain runs it without.
const raced = true

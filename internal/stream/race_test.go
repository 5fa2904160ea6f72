//go:build race

package stream_test

// raced: the race detector makes everything ten times as slow; tests that
// repeat one thing at many places take every fourth.
const raced = true

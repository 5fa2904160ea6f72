//go:build !race

package alloc

const raced = false

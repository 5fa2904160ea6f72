//go:build !linux

package link

import "net"

// Elsewhere nobody falls.
func digTCP(net.Listener) func(net.Listener) (pit, error) { return nil }

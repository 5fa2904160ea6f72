//go:build !linux

package relay

import (
	"io"
	"net"
)

// forward moves what comes from one connection to the other until its end.
func forward(to, from net.Conn) error {
	_, err := io.Copy(to, from)
	return err
}

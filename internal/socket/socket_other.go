//go:build !linux

package socket

import (
	"errors"
	"net"
	"syscall"
)

// Raw gives nil: elsewhere every connection is read and written in the ordinary way.
func Raw(net.Conn) syscall.RawConn { return nil }

// Read is for Linux.
func Read(uintptr, ...[]byte) (int, error) { return 0, errors.ErrUnsupported }

// Write is for Linux.
func Write(uintptr, ...[]byte) (int, error) { return 0, errors.ErrUnsupported }

func (w *Writer) attempt(uintptr) bool { return true }

// Package ruler is bytes that say which transfer they are of and where in it they belong: what was
// lost, repeated, moved or exchanged on the way is seen at the first byte, without a copy of what was
// sent.
package ruler

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
)

// ErrWrong is in the error of a reader that got a byte which does not belong where it came.
var ErrWrong = errors.New("a byte that was not sent there")

// word is the i-th eight bytes of a transfer: splitmix64's output function over both numbers.
func word(transfer uint32, i int64) uint64 {
	x := uint64(transfer)<<40 + uint64(i)*0x9e3779b97f4a7c15
	x = (x ^ x>>30) * 0xbf58476d1ce4e5b9
	x = (x ^ x>>27) * 0x94d049bb133111eb
	return x ^ x>>31
}

// Fill fills b with the bytes of a transfer from a place on.
func Fill(b []byte, transfer uint32, at int64) {
	var w [8]byte
	for len(b) > 0 {
		binary.BigEndian.PutUint64(w[:], word(transfer, at/8))
		n := copy(b, w[at%8:])
		b, at = b[n:], at+int64(n)
	}
}

// Send writes the first n bytes of a transfer; with a negative n it ends with an error only. It gives how
// many it wrote.
func Send(w io.Writer, transfer uint32, n int64) (sent int64, err error) {
	b := make([]byte, 32<<10)
	for n < 0 || sent < n {
		part := b
		if n >= 0 {
			part = b[:min(int64(len(b)), n-sent)]
		}
		Fill(part, transfer, sent)
		k, err := w.Write(part)
		sent += int64(k)
		if err != nil {
			return sent, err
		}
	}
	return sent, nil
}

// A Checker compares what it is written with a transfer.
type Checker struct {
	Transfer uint32
	N        int64 // how many bytes came
	want     []byte
}

// Write fails with ErrWrong at the first byte that does not belong there.
func (c *Checker) Write(b []byte) (int, error) {
	if len(c.want) < len(b) {
		c.want = make([]byte, len(b))
	}
	want := c.want[:len(b)]
	Fill(want, c.Transfer, c.N)
	for i := range b {
		if b[i] != want[i] {
			return i, fmt.Errorf("byte %d of transfer %d: %w", c.N+int64(i), c.Transfer, ErrWrong)
		}
	}
	c.N += int64(len(b))
	return len(b), nil
}

// Receive reads a transfer until it ends and gives how many right bytes came. The error is nil when an
// end of file was read behind them, and ErrWrong when another byte was.
func Receive(r io.Reader, transfer uint32) (int64, error) {
	c := Checker{Transfer: transfer}
	_, err := io.CopyBuffer(struct{ io.Writer }{&c}, struct{ io.Reader }{r}, make([]byte, 32<<10))
	return c.N, err
}

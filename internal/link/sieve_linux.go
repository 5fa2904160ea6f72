package link

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"syscall"

	"golang.org/x/sys/unix"
)

// A tarpit is a second listener at the address of the first, which nobody accepts from:
// one connection is as many as its queue takes, and the kernel drops what would be the
// next at its first packet. The two share the address by SO_REUSEPORT, and a program of
// the kernel's (classic BPF) says which of them a packet is for: socket(7),
// SO_ATTACH_REUSEPORT_CBPF. That takes no privilege, which a filter before the listener
// itself does in newer kernels.
type tarpit struct {
	first syscall.RawConn
	fd    int
}

// digTCP is how a pit is made before ln; nil: it cannot be.
func digTCP(ln net.Listener) func(net.Listener) (pit, error) {
	if _, ok := ln.(*net.TCPListener); !ok {
		return nil
	}
	return func(ln net.Listener) (pit, error) {
		raw, err := ln.(*net.TCPListener).SyscallConn()
		if err != nil {
			return nil, err
		}
		p, err := newTarpit(raw)
		if err != nil {
			return nil, err // and no pit that is a nil
		}
		return p, nil
	}
}

func newTarpit(raw syscall.RawConn) (_ *tarpit, err error) {
	var at unix.Sockaddr
	only := 0
	if e := raw.Control(func(fd uintptr) {
		var shared int
		if shared, err = unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEPORT); shared != 0 || err != nil {
			if err == nil {
				err = errors.New("others listen at it too")
			}
			return // which of them is first is not known here
		}
		if at, err = unix.Getsockname(int(fd)); err != nil {
			return
		}
		if _, six := at.(*unix.SockaddrInet6); six {
			if only, err = unix.GetsockoptInt(int(fd), unix.IPPROTO_IPV6, unix.IPV6_V6ONLY); err != nil {
				return
			}
		}
		// From now on, until the listener is closed, a socket of the same user may share
		// the address, if it asks to.
		err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEPORT, 1)
	}); e != nil {
		err = e
	}
	if err != nil {
		return nil, fmt.Errorf("sharing the listener's address: %w", err)
	}
	p := &tarpit{raw, -1}
	defer func() {
		if err != nil {
			p.close()
		}
	}()
	domain := unix.AF_INET
	if _, six := at.(*unix.SockaddrInet6); six {
		domain = unix.AF_INET6
	}
	p.fd, err = unix.Socket(domain, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		p.fd = -1
		return nil, os.NewSyscallError("socket", err)
	}
	for _, o := range []struct{ level, name, value int }{
		{unix.SOL_SOCKET, unix.SO_REUSEADDR, 1}, // connections at the address are no obstacle
		{unix.SOL_SOCKET, unix.SO_REUSEPORT, 1},
		{unix.IPPROTO_IPV6, unix.IPV6_V6ONLY, only},
	} {
		if o.level == unix.IPPROTO_IPV6 && domain == unix.AF_INET {
			continue
		}
		if err = unix.SetsockoptInt(p.fd, o.level, o.name, o.value); err != nil {
			return nil, os.NewSyscallError("setsockopt", err)
		}
	}
	if err = unix.Bind(p.fd, at); err != nil {
		return nil, os.NewSyscallError("bind", err)
	}
	// The kernel shares by chance until it is told otherwise, which a moment later it is.
	if err = unix.Listen(p.fd, 0); err != nil {
		return nil, os.NewSyscallError("listen", err)
	}
	if err = p.steer(nil); err != nil {
		return nil, err
	}
	p.rescue()
	return p, nil
}

// rescue resets whoever came into the pit before it had a program, so that he comes again.
func (p *tarpit) rescue() {
	for {
		fd, _, err := unix.Accept4(p.fd, unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK)
		if err != nil {
			return
		}
		unix.SetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1})
		unix.Close(fd)
	}
}

// The listener came first, the pit second.
const toFirst, toPit = 0, 1

func (p *tarpit) steer(all []netip.Prefix) error {
	filter := program(all)
	err := unix.SetsockoptSockFprog(p.fd, unix.SOL_SOCKET, unix.SO_ATTACH_REUSEPORT_CBPF,
		&unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]})
	return os.NewSyscallError("setsockopt SO_ATTACH_REUSEPORT_CBPF", err)
}

// close fills it: its queue ends with a reset.
func (p *tarpit) close() {
	if p.fd >= 0 {
		unix.Close(p.fd)
		p.fd = -1
	}
	p.first.Control(func(fd uintptr) { unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEPORT, 0) })
}

// Offsets at which classic BPF reads what is not in the packet's payload: linux/filter.h.
const (
	offAncillary = 0xfffff000 // SKF_AD_OFF
	offProtocol  = offAncillary + 0
	offRandom    = offAncillary + 56
	offNetwork   = 0xfff00000 // SKF_NET_OFF
	offSource4   = offNetwork + 12
	offSource6   = offNetwork + 8
)

// program is what gives toPit for packets from all, but one in triesBeyond, and toFirst
// for others. A jump goes no further than 255 instructions, so it has an end for every
// few addresses.
func program(all []netip.Prefix) (prog []unix.SockFilter) {
	put := func(code uint16, jt, jf uint8, k uint32) {
		prog = append(prog, unix.SockFilter{Code: code, Jt: jt, Jf: jf, K: k})
	}
	load := func(at uint32) { put(unix.BPF_LD|unix.BPF_W|unix.BPF_ABS, 0, 0, at) }
	give := func(to uint32) { put(unix.BPF_RET|unix.BPF_K, 0, 0, to) }
	const equal, more, jump = unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, unix.BPF_JMP | unix.BPF_JGE | unix.BPF_K, unix.BPF_JMP | unix.BPF_JA
	// fall is behind a block: who is in it has jumped to its second instruction.
	const fallen = 5
	fall := func() {
		put(jump, 0, 0, fallen-1)
		load(offRandom)
		put(more, 0, 1, 1<<32/triesBeyond)
		give(toPit)
		give(toFirst)
	}
	var four, six []netip.Prefix
	for _, p := range all {
		if p.Addr().Is4() {
			four = append(four, p)
		} else {
			six = append(six, p)
		}
	}
	const each4, each6 = 200, 60 // one and four instructions an address: under 255
	put(unix.BPF_LD|unix.BPF_H|unix.BPF_ABS, 0, 0, offProtocol)
	size4 := 1 + len(four) + (len(four)+each4-1)/each4*fallen
	put(equal, 1, 0, unix.ETH_P_IP)
	put(jump, 0, 0, uint32(size4)+1) // past those of IPv4 and their end
	load(offSource4)
	for ; len(four) > 0; four = four[min(each4, len(four)):] {
		block := four[:min(each4, len(four))]
		for i, p := range block {
			a := p.Addr().As4()
			put(equal, uint8(len(block)-i), 0, binary.BigEndian.Uint32(a[:]))
		}
		fall()
	}
	give(toFirst)
	for ; len(six) > 0; six = six[min(each6, len(six)):] {
		block := six[:min(each6, len(six))]
		for i, p := range block {
			a := p.Addr().As16()
			load(offSource6)
			put(equal, 0, 2, binary.BigEndian.Uint32(a[:4]))
			load(offSource6 + 4)
			put(equal, uint8(4*(len(block)-1-i)+1), 0, binary.BigEndian.Uint32(a[4:8]))
		}
		fall()
	}
	give(toFirst)
	return prog
}

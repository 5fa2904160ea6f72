package identity

import "sync"

// listeners is a set of callbacks. One costs about 50 bytes, and adding and
// removing one takes constant time: a peer may have 10,000 streams.
type listeners struct {
	mu  sync.Mutex
	all []*listener
}

type listener struct {
	f  func()
	at int // place in all; -1: removed
}

func (l *listeners) add(f func()) (stop func()) {
	l.mu.Lock()
	defer l.mu.Unlock()
	n := &listener{f, len(l.all)}
	l.all = append(l.all, n)
	return func() { l.remove(n) }
}

func (l *listeners) remove(n *listener) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if n.at < 0 {
		return
	}
	last := len(l.all) - 1
	l.all[n.at] = l.all[last]
	l.all[n.at].at = n.at
	l.all[last] = nil
	l.all = l.all[:last]
	n.at, n.f = -1, nil
	if last == 0 {
		l.all = nil
	}
}

// call runs each callback, on the caller's goroutine and without the lock, so
// that one may add or remove others, or read what changed.
func (l *listeners) call() {
	l.mu.Lock()
	all := append([]*listener(nil), l.all...)
	l.mu.Unlock()
	for _, n := range all {
		l.mu.Lock()
		f := n.f
		l.mu.Unlock()
		if f != nil {
			f()
		}
	}
}

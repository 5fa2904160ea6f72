package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"
)

// eventEvery is how often the HTTP server sends an event: as often as a model gives tokens.
const eventEvery = 10 * time.Millisecond

// serveHTTP answers GET /?events=N with N server-sent events that carry their numbers, the first at
// once. What was read of the connection already is put before it.
func serveHTTP(c *net.TCPConn, read []byte) error {
	l := &oneConn{conn: &prefixed{Conn: c, prefix: read, closed: make(chan struct{})}}
	err := (&http.Server{Handler: http.HandlerFunc(events)}).Serve(l)
	if errors.Is(err, io.EOF) {
		return nil
	}
	return err
}

func events(w http.ResponseWriter, r *http.Request) {
	n, err := strconv.Atoi(r.FormValue("events"))
	if err != nil || n < 1 {
		http.Error(w, "events=N", http.StatusBadRequest)
		return
	}
	w.Header().Set("Content-Type", "text/event-stream")
	tick := time.NewTicker(eventEvery)
	defer tick.Stop()
	for i := range n {
		if i > 0 {
			select {
			case <-tick.C:
			case <-r.Context().Done():
				return
			}
		}
		fmt.Fprintf(w, "data: %d\n\n", i)
		w.(http.Flusher).Flush()
	}
}

// oneConn is a listener of a connection that is there; it ends with it.
type oneConn struct {
	conn  *prefixed
	given bool
}

func (l *oneConn) Accept() (net.Conn, error) {
	if !l.given {
		l.given = true
		return l.conn, nil
	}
	<-l.conn.closed
	return nil, io.EOF
}

func (l *oneConn) Close() error   { return nil }
func (l *oneConn) Addr() net.Addr { return l.conn.LocalAddr() }

// prefixed is a connection of which prefix was read already.
type prefixed struct {
	net.Conn
	prefix []byte
	closed chan struct{}
}

func (p *prefixed) Read(b []byte) (int, error) {
	if len(p.prefix) > 0 {
		n := copy(b, p.prefix)
		p.prefix = p.prefix[n:]
		return n, nil
	}
	return p.Conn.Read(b)
}

// Close is called once, by the HTTP server.
func (p *prefixed) Close() error {
	err := p.Conn.Close()
	close(p.closed)
	return err
}

// A stream of events as a client saw it.
type eventTimes struct {
	first spread // from before connecting to the first byte of the answer's body
	gaps  spread // between an event and the next
}

// sse asks for one event again and again for a quarter of d, each over a new connection, then for
// as many as come in the rest of it.
func sse(ctx context.Context, addr string, d time.Duration) (eventTimes, error) {
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return dial(ctx, addr, d)
	}}}
	var first []time.Duration
	for begin := time.Now(); len(first) < 3 || time.Since(begin) < d/4; {
		start := time.Now()
		at, err := receive(ctx, client, addr, 1)
		if err != nil {
			return eventTimes{}, err
		}
		first = append(first, at[0].Sub(start))
	}
	at, err := receive(ctx, client, addr, max(3, int(d*3/4/eventEvery)))
	if err != nil {
		return eventTimes{}, err
	}
	var gaps []time.Duration
	for i := range len(at) - 1 {
		gaps = append(gaps, at[i+1].Sub(at[i]))
	}
	return eventTimes{spreadOf(first), spreadOf(gaps)}, nil
}

// receive asks for n events and says when each came.
func receive(ctx context.Context, client *http.Client, addr string, n int) (at []time.Time, err error) {
	u := url.URL{Scheme: "http", Host: addr, Path: "/", RawQuery: "events=" + strconv.Itoa(n)}
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, u.String(), nil)
	if err != nil {
		return nil, err
	}
	answer, err := client.Do(request)
	if err != nil {
		return nil, err
	}
	defer answer.Body.Close()
	if answer.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("the answer is %s", answer.Status)
	}
	for lines := bufio.NewScanner(answer.Body); ; {
		if !lines.Scan() {
			if err := lines.Err(); err != nil {
				return nil, err
			}
			break
		}
		number, ok := strings.CutPrefix(lines.Text(), "data: ")
		if !ok {
			continue
		}
		if number != strconv.Itoa(len(at)) {
			return nil, fmt.Errorf("event %s came in place of %d", number, len(at))
		}
		at = append(at, time.Now())
	}
	if len(at) != n {
		return nil, fmt.Errorf("the stream of events ended cleanly after %d of %d", len(at), n)
	}
	return at, nil
}

package inlet

import (
	"bufio"
	"errors"
	"io"
	"net/http"
	"slices"
	"strings"
	"testing"

	"github.com/portal-tunnel/portal/internal/alloc"
)

// guarded is what a guard says of a whole text: read at once, and byte by byte.
func guarded(t *testing.T, text string, hosts ...string) (*guard, error) {
	t.Helper()
	whole, bytewise := newGuard(hosts), newGuard(hosts)
	first := whole.check([]byte(text))
	var second error
	for i := 0; i < len(text) && second == nil; i++ {
		second = bytewise.check([]byte{text[i]})
	}
	if (first == nil) != (second == nil) || first != nil && first.Error() != second.Error() || whole.heads != bytewise.heads {
		t.Errorf("%q: at once %v after %d heads, byte by byte %v after %d", text, first, whole.heads, second, bytewise.heads)
	}
	return whole, first
}

func TestPagesOfOtherSitesDoNotPass(t *testing.T) {
	const get = "GET / HTTP/1.1\r\n"
	foreign := []string{
		get + "Host: evil.example\r\n\r\n",
		get + "Host: evil.example:15432\r\n\r\n",
		get + "host:evil.example\r\n\r\n",
		get + "Host: localhost.evil.example\r\n\r\n",
		get + "Host: 127.0.0.1.evil.example\r\n\r\n",
		get + "Host: evillocalhost\r\n\r\n",
		get + "Host: localhost\r\nHost: evil.example\r\n\r\n",
		get + "Host: evil.example\r\nHost: localhost\r\n\r\n",
		get + "Host: localhost\r\nOrigin: https://evil.example\r\n\r\n",
		get + "Origin: https://evil.example\r\nHost: localhost\r\n\r\n",
		get + "Host: localhost\r\nOrigin: null\r\n\r\n",
		get + "Host: localhost\r\nOrigin: http://203.0.113.9\r\n\r\n",
		get + "Host: localhost\r\nOrigin: https://localhost.evil.example\r\n\r\n",
		get + "Host: localhost\r\nOrigin: file://\r\n\r\n",
		get + "Host: localhost\r\nSec-Fetch-Site: cross-site\r\n\r\n",
		get + "Host: localhost\nOrigin: https://evil.example\n\n",
		"GET http://evil.example/ HTTP/1.1\r\nHost: localhost\r\n\r\n",
		"CONNECT evil.example:443 HTTP/1.1\r\nHost: localhost\r\n\r\n",
		get + "Host: localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nOrigin: https://evil.example\r\n\r\n",
		// The second request of a connection, behind a body of either form.
		get + "Host: localhost\r\n\r\n" + get + "Host: evil.example\r\n\r\n",
		"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\n\r\nhello" + get + "Host: evil.example\r\n\r\n",
		"POST / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n5;x=y\r\nhello\r\n0\r\nT: x\r\n\r\n" + get + "Host: evil.example\r\n\r\n",
	}
	for _, text := range foreign {
		var refused *foreignError
		if _, err := guarded(t, text); !errors.As(err, &refused) {
			t.Errorf("%q: %v", text, err)
		}
	}
	t.Logf("F-34: of %d requests with a foreign Host or Origin none passes", len(foreign))
}

func TestRequestsToThisHostPass(t *testing.T) {
	for _, head := range []string{
		"Host: localhost:15432", "Host: LOCALHOST", "Host: localhost.", "Host: 127.0.0.1:1", "Host: 127.8.8.8", "Host: [::1]:80", "Host: [::1]",
		"Host: app.localhost", "Host: 192.0.2.1:8080", "Host:", "X: y", "Host: llm.internal:80",
		"Host: localhost\r\nOrigin: http://localhost:3000", "Host: localhost\r\nOrigin: http://[::1]:3000",
		"Host: 192.0.2.1:8080\r\nOrigin: http://192.0.2.1:8080", "Host: llm.internal\r\nOrigin: https://llm.internal",
		"Host: localhost\r\nSec-Fetch-Site: same-origin",
	} {
		if g, err := guarded(t, "GET / HTTP/1.1\r\n"+head+"\r\n\r\n", "llm.internal"); err != nil || g.heads != 1 {
			t.Errorf("%q: %v, %d heads", head, err, g.heads)
		}
	}
	for text, heads := range map[string]int{
		"\r\nGET / HTTP/1.0\r\n\r\n": 1,
		"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 3\r\n\r\nabcGET / HTTP/1.1\r\n\r\n":                                                    2,
		"POST / HTTP/1.1\r\nTransfer-Encoding: Chunked\r\n\r\n3\r\nabc\r\nA \r\n0123456789\r\n00\r\n\r\nGET / HTTP/1.1\r\n\r\n":                       2,
		"GET / HTTP/1.1\r\nConnection: upgrade\r\nUpgrade: websocket\r\nOrigin: http://localhost\r\nHost: localhost\r\n\r\n\x81\x05hello\r\n\x00\r\n": 1,
		"GET /fetch?url=http://elsewhere.example/ HTTP/1.1\r\nHost: localhost\r\n\r\n":                                                                1,
		"GET /go/https://elsewhere.example HTTP/1.1\r\nHost: localhost\r\n\r\n":                                                                       1,
		"GET http://localhost/go?to=http://elsewhere.example HTTP/1.1\r\n\r\n":                                                                        1,
		"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00":                                                                                                    1,
		"CONNECT localhost:1 HTTP/1.1\r\n\r\n\x16\x03":                                                                                                1,
	} {
		if g, err := guarded(t, text); err != nil || g.heads != heads {
			t.Errorf("%q: %v, %d heads", text, err, g.heads)
		}
	}
}

func TestWhatTwoReadersMayUnderstandDifferentlyIsRefused(t *testing.T) {
	const post = "POST / HTTP/1.1\r\nHost: localhost\r\n"
	twofold := map[string]error{
		post + "Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n":      errFraming,
		post + "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n": errFraming,
		post + "Transfer-Encoding: gzip, chunked\r\n":                         errFraming,
		post + "Content-Length: 5\r\nContent-Length: 6\r\n":                   errFraming,
		post + "Content-Length: +5\r\n":                                       errFraming,
		post + "Content-Length: 5,5\r\n":                                      errFraming,
		post + "Content-Length: 99999999999999999999\r\n":                     errFraming,
		post + "Content-Length : 5\r\n":                                       errHeader,
		post + " folded: line\r\n":                                            errHeader,
		post + "X: a\rb\r\n":                                                  errHeader,
		post + "X: \x00\r\n":                                                  errHeader,
		post + "no colon\r\n":                                                 errHeader,
		post + "Transfer-Encoding: chunked\r\n\r\nx\r\n":                      errChunk,
		post + "Transfer-Encoding: chunked\r\n\r\n\r\n":                       errChunk,
		post + "Transfer-Encoding: chunked\r\n\r\n+1\r\n":                     errChunk,
		post + "Transfer-Encoding: chunked\r\n\r\n1\r\nab\r\n":                errChunk,
		"GET /\r\n":            errRequest,
		"GET / HTTP/2.0\r\n":   errRequest,
		"GET / HTTP/1.1 x\r\n": errRequest,
		"\x16\x03\x01\x02\n":   errRequest,
		post + "X: " + strings.Repeat("a", maxHead) + "\r\n": errHead,
	}
	for text, want := range twofold {
		if _, err := guarded(t, text); !errors.Is(err, want) {
			t.Errorf("%.80q: %v, want %v", text, err, want)
		}
	}
	t.Logf("F-34: of %d requests that two readers may understand differently none passes", len(twofold))
}

// Whatever net/http takes for a request with a foreign host, the guard has objected to.
func FuzzGuardSeesWhatAServerSees(f *testing.F) {
	f.Add([]byte("GET / HTTP/1.1\r\nHost: evil.example\r\n\r\n"))
	f.Add([]byte("POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\n\r\nhelloGET / HTTP/1.1\r\nHost: evil.example\r\n\r\n"))
	f.Add([]byte("POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\nGET / HTTP/1.1\r\nOrigin: null\r\n\r\n"))
	f.Fuzz(func(t *testing.T, text []byte) {
		defer alloc.Bound(t, len(text))()
		g := newGuard(nil)
		err := g.check(slices.Clone(text))
		if len(g.line) > maxHead {
			t.Fatalf("%d bytes are held", len(g.line))
		}
		if err != nil {
			return
		}
		in := bufio.NewReader(strings.NewReader(string(text)))
		for range 100 {
			r, err := http.ReadRequest(in)
			if err != nil {
				return
			}
			if r.Header.Get("Upgrade") != "" || r.Method == "CONNECT" || r.Method == "PRI" {
				return
			}
			name := hostName(r.Host)
			if r.Host != "" && strings.Contains(name, "evil") {
				t.Fatalf("%q: the host %q passed", text, r.Host)
			}
			if o := r.Header.Get("Origin"); strings.Contains(o, "evil") || o == "null" {
				t.Fatalf("%q: the origin %q passed", text, o)
			}
			if _, err := io.Copy(io.Discard, r.Body); err != nil {
				return
			}
		}
	})
}

func TestAGuardAllocatesLittleForLyingInput(t *testing.T) {
	check := func(b []byte) { newGuard(nil).check(b) }
	alloc.Hostile(t, check,
		[]byte("POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\n\r\nhelloGET / HTTP/1.1\r\nHost: localhost\r\n\r\n"),
		[]byte("POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\nGET / HTTP/1.1\r\nOrigin: null\r\n\r\n"),
	)
}

func TestARequestOfManyHostsIsMalformed(t *testing.T) {
	if _, err := guarded(t, "GET / HTTP/1.1\r\n"+strings.Repeat("Host: localhost\r\n", maxHosts+1)+"\r\n"); err != errHeader {
		t.Errorf("the guard says %v", err)
	}
}

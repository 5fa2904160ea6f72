package channel

import (
	"bufio"
	"bytes"
	"crypto/ecdh"
	"encoding/hex"
	"encoding/json"
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/flynn/noise"
)

// The Noise protocols of the two suites. XX without a key is here because fewer
// authors published vectors for XXpsk3.
var protocols = map[string]struct {
	suite Suite
	psk   bool
}{
	"Noise_XX_25519_AESGCM_SHA256":          {AESGCM, false},
	"Noise_XXpsk3_25519_AESGCM_SHA256":      {AESGCM, true},
	"Noise_XX_25519_ChaChaPoly_BLAKE2s":     {ChaChaPoly, false},
	"Noise_XXpsk3_25519_ChaChaPoly_BLAKE2s": {ChaChaPoly, true},
}

// vector is one public test vector, with the fields' names of the JSON files.
type vector struct {
	Name      string    `json:"protocol_name"`
	Hash      hexBytes  `json:"handshake_hash"`
	Initiator vectorEnd `json:"-"`
	Responder vectorEnd `json:"-"`
	Messages  []struct {
		Payload, Ciphertext hexBytes
	} `json:"messages"`

	initiatorFirst bool // its first record comes from the initiator, not from the responder
}

type vectorEnd struct{ prologue, static, ephemeral, psk hexBytes }

type hexBytes []byte

func (h *hexBytes) UnmarshalText(text []byte) (err error) {
	*h, err = hex.DecodeString(string(text))
	return err
}

func (v *vector) UnmarshalJSON(b []byte) error {
	type plain vector
	if err := json.Unmarshal(b, (*plain)(v)); err != nil {
		return err
	}
	var ends struct {
		InitPrologue  hexBytes   `json:"init_prologue"`
		InitStatic    hexBytes   `json:"init_static"`
		InitEphemeral hexBytes   `json:"init_ephemeral"`
		InitPSKs      []hexBytes `json:"init_psks"`
		RespPrologue  hexBytes   `json:"resp_prologue"`
		RespStatic    hexBytes   `json:"resp_static"`
		RespEphemeral hexBytes   `json:"resp_ephemeral"`
		RespPSKs      []hexBytes `json:"resp_psks"`
	}
	if err := json.Unmarshal(b, &ends); err != nil {
		return err
	}
	v.Initiator = vectorEnd{ends.InitPrologue, ends.InitStatic, ends.InitEphemeral, nil}
	v.Responder = vectorEnd{ends.RespPrologue, ends.RespStatic, ends.RespEphemeral, nil}
	if len(ends.InitPSKs) > 0 && len(ends.RespPSKs) > 0 {
		v.Initiator.psk, v.Responder.psk = ends.InitPSKs[0], ends.RespPSKs[0]
	}
	return nil
}

func TestPublicVectorsOfTheNoiseModuleHold(t *testing.T) {
	out, err := exec.Command("go", "list", "-m", "-f", "{{.Dir}}", "github.com/flynn/noise").Output()
	if err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(filepath.Join(strings.TrimSpace(string(out)), "vectors.txt"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	// name=value lines, a vector begins with "handshake=".
	var all []*vector
	var v *vector
	lines := bufio.NewScanner(f)
	for lines.Scan() {
		name, value, ok := strings.Cut(lines.Text(), "=")
		if !ok {
			continue
		}
		if name == "handshake" {
			v = &vector{Name: value, initiatorFirst: true}
			all = append(all, v)
			continue
		}
		b, err := hex.DecodeString(value)
		if err != nil {
			t.Fatal(err)
		}
		switch {
		case name == "prologue":
			v.Initiator.prologue, v.Responder.prologue = b, b
		case name == "preshared_key":
			v.Initiator.psk, v.Responder.psk = b, b
		case name == "init_static":
			v.Initiator.static = b
		case name == "resp_static":
			v.Responder.static = b
		case name == "gen_init_ephemeral":
			v.Initiator.ephemeral = b
		case name == "gen_resp_ephemeral":
			v.Responder.ephemeral = b
		case strings.HasSuffix(name, "_payload"):
			v.Messages = append(v.Messages, struct{ Payload, Ciphertext hexBytes }{Payload: b})
		case strings.HasSuffix(name, "_ciphertext"):
			v.Messages[len(v.Messages)-1].Ciphertext = b
		}
	}
	if lines.Err() != nil {
		t.Fatal(lines.Err())
	}
	// Each protocol four times: with and without payloads and a prologue.
	if n := replayAll(t, all); n != 16 {
		t.Errorf("%d vectors of the two suites, want 16", n)
	}
	t.Logf("F-37: 16 vectors of the Noise module's own that are of the suites used")
}

func TestVectorsOfOtherImplementationsHold(t *testing.T) {
	for file, want := range map[string]int{"cacophony.txt": 4, "snow.txt": 2} {
		path := filepath.Join("..", "..", "..", "shared", "vectors", file)
		b, err := os.ReadFile(path)
		if errors.Is(err, fs.ErrNotExist) {
			t.Logf("NOT RUN: there is no %s; these vectors are kept outside the repository", path)
			continue
		}
		if err != nil {
			t.Fatal(err)
		}
		var all struct {
			Vectors []*vector `json:"vectors"`
		}
		if err := json.Unmarshal(b, &all); err != nil {
			t.Fatal(err)
		}
		if n := replayAll(t, all.Vectors); n != want {
			t.Errorf("%s: %d vectors of the two suites, want %d", file, n, want)
		}
		t.Logf("F-37: %d vectors of %s that are of the suites used", want, file)
	}
}

func replayAll(t *testing.T, all []*vector) (n int) {
	for _, v := range all {
		if p, ok := protocols[v.Name]; ok {
			v.replay(t, p.suite, p.psk)
			n++
		}
	}
	return n
}

// replay runs the handshake with the module, and what follows with the record
// layer's keys and nonces, without the associated data that is the channel's own.
func (v *vector) replay(t *testing.T, suite Suite, psk bool) {
	t.Helper()
	i, r := v.state(t, v.Initiator, suite, psk, true), v.state(t, v.Responder, suite, psk, false)
	var toR, toI *noise.CipherState
	for n, m := range v.Messages[:3] {
		from, to := i, r
		if n == 1 {
			from, to = r, i
		}
		if n == 2 && psk { // the key comes late, as the KEM gives it
			if i.SetPresharedKey(v.Initiator.psk) != nil || r.SetPresharedKey(v.Responder.psk) != nil {
				t.Fatal("the key is not taken")
			}
		}
		out, a, b, err := from.WriteMessage(nil, m.Payload)
		if err != nil || !bytes.Equal(out, m.Ciphertext) {
			t.Fatalf("%s: message %d is %x (%v), want %x", v.Name, n, out, err, m.Ciphertext)
		}
		payload, c, d, err := to.ReadMessage(nil, out)
		if err != nil || !bytes.Equal(payload, m.Payload) {
			t.Fatalf("%s: message %d gives %x (%v), want %x", v.Name, n, payload, err, m.Payload)
		}
		if toR, toI = a, b; n == 2 && (a.UnsafeKey() != c.UnsafeKey() || b.UnsafeKey() != d.UnsafeKey()) {
			t.Fatalf("%s: the ends have different keys", v.Name)
		}
	}
	if len(v.Hash) > 0 && !bytes.Equal(i.ChannelBinding(), v.Hash) {
		t.Errorf("%s: h is %x, want %x", v.Name, i.ChannelBinding(), v.Hash)
	}
	down, err := newRecords(suite, toR.UnsafeKey())
	if err != nil {
		t.Fatal(err)
	}
	up, err := newRecords(suite, toI.UnsafeKey())
	if err != nil {
		t.Fatal(err)
	}
	for n, m := range v.Messages[3:] {
		direction := up
		if n%2 == 1 != v.initiatorFirst {
			direction = down
		}
		nonce, err := direction.next(len(m.Payload))
		if err != nil {
			t.Fatal(err)
		}
		if out := direction.aead.Seal(nil, nonce, m.Payload, nil); !bytes.Equal(out, m.Ciphertext) {
			t.Errorf("%s: record %d is %x, want %x", v.Name, n, out, m.Ciphertext)
		}
	}
	if len(v.Messages) < 5 {
		t.Errorf("%s: no records in the vector", v.Name)
	}
}

func (v *vector) state(t *testing.T, e vectorEnd, suite Suite, psk, initiator bool) *noise.HandshakeState {
	t.Helper()
	static, err := ecdh.X25519().NewPrivateKey(e.static)
	if err != nil {
		t.Fatal(err)
	}
	c := noise.Config{
		CipherSuite: cipherSuite(suite, newX25519(static)), Random: bytes.NewReader(e.ephemeral), Pattern: noise.HandshakeXX,
		Initiator: initiator, Prologue: e.prologue, StaticKeypair: keypair(static),
	}
	if psk {
		c.PresharedKeyPlacement = 3
	}
	state, err := noise.NewHandshakeState(c)
	if err != nil {
		t.Fatal(err)
	}
	return state
}

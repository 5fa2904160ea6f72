package identity

import (
	"bytes"
	"crypto/rand"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/veraison/go-cose"
)

// sealed signs claims by hand as authority would, after edits.
func sealed(t testing.TB, authority *Self, payload, external []byte, edit func(*cose.Headers)) []byte {
	t.Helper()
	m := cose.UntaggedSign1Message{Headers: cose.Headers{Protected: protectedHeader()}, Payload: payload}
	if edit != nil {
		edit(&m.Headers)
	}
	signer, err := cose.NewSigner(cose.AlgorithmEdDSA, authority.state.Load().key)
	if err != nil {
		t.Fatal(err)
	}
	if err := m.Sign(rand.Reader, external, signer); err != nil {
		t.Fatal(err)
	}
	raw, err := m.MarshalCBOR()
	if err != nil {
		t.Fatal(err)
	}
	return raw
}

func goodClaims(authority, node *Self) claims {
	latest := node.Latest()
	return claims{
		Issuer: authority.ID().String(), Subject: node.ID().String(), Serial: make([]byte, 16), Change: latest[:],
		Attributes: map[string]any{"role": "agent"},
		NotBefore:  noon.Unix(), Expires: noon.Unix() + 3600,
		NotBeforeMs: noon.UnixMilli(), ExpiresMs: noon.UnixMilli() + 3600_000,
	}
}

var credentialAAD = []byte("portal/credential/v1")

func TestCredentialThatBreaksARuleIsRefused(t *testing.T) {
	authority, node, other := newSelf(t), newSelf(t), newSelf(t)
	trust := NewTrust(authority.ID())
	verify := func(raw []byte) error {
		_, err := trust.Verify(raw, authority.History(), node.ID(), node.Latest(), noon)
		return err
	}
	if c := goodClaims(authority, node); verify(sealed(t, authority, encode(&c), credentialAAD, nil)) != nil {
		t.Fatal("the credential that keeps the rules is refused")
	}

	claimTests := []struct {
		name string
		edit func(*claims)
		want error
	}{
		{"subject is another", func(c *claims) { c.Subject = other.ID().String() }, ErrSubject},
		{"change is another", func(c *claims) { c.Change = make([]byte, 32) }, ErrSubject},
		{"change is short", func(c *claims) { c.Change = c.Change[:31] }, ErrMalformed},
		{"serial is long", func(c *claims) { c.Serial = make([]byte, 17) }, ErrMalformed},
		{"serial is missing", func(c *claims) { c.Serial = nil }, ErrMalformed},
		{"issuer is no identifier", func(c *claims) { c.Issuer = "authority" }, ErrMalformed},
		{"subject in lower case", func(c *claims) { c.Subject = strings.ToLower(c.Subject) }, ErrMalformed},
		{"exp contradicts milliseconds", func(c *claims) { c.Expires++ }, ErrMalformed},
		{"nbf contradicts milliseconds", func(c *claims) { c.NotBefore-- }, ErrMalformed},
		{"ends before it begins", func(c *claims) { c.ExpiresMs, c.Expires = c.NotBeforeMs, c.NotBefore }, ErrMalformed},
		{"far future", func(c *claims) { c.ExpiresMs, c.Expires = latestTime+1, (latestTime+1)/1000 }, ErrMalformed},
		{"attribute id", func(c *claims) { c.Attributes["id"] = "x" }, ErrMalformed},
		{"attribute authority", func(c *claims) { c.Attributes["authority"] = "x" }, ErrMalformed},
		{"attribute node", func(c *claims) { c.Attributes["node"] = true }, ErrMalformed},
		{"name is an integer", func(c *claims) { c.Attributes["name"] = int64(1) }, ErrMalformed},
		{"name is no name", func(c *claims) { c.Attributes["name"] = "DB 1" }, ErrMalformed},
		{"serve is text", func(c *claims) { c.Attributes["serve"] = "a" }, ErrMalformed},
		{"serve has a bare wildcard", func(c *claims) { c.Attributes["serve"] = []string{"*"} }, ErrMalformed},
		{"serve has the authority", func(c *claims) { c.Attributes["serve"] = []string{"authority"} }, ErrMalformed},
		{"relay is text", func(c *claims) { c.Attributes["relay"] = "true" }, ErrMalformed},
		{"float", func(c *claims) { c.Attributes["x"] = 1.5 }, ErrMalformed},
		{"null", func(c *claims) { c.Attributes["x"] = nil }, ErrMalformed},
		{"bytes", func(c *claims) { c.Attributes["x"] = []byte("x") }, ErrMalformed},
		{"map", func(c *claims) { c.Attributes["x"] = map[string]any{"y": "z"} }, ErrMalformed},
		{"list of integers", func(c *claims) { c.Attributes["x"] = []any{"a", int64(1)} }, ErrMalformed},
		{"integer of 64 bits without sign", func(c *claims) { c.Attributes["x"] = uint64(1 << 63) }, ErrMalformed},
		{"name with a dot", func(c *claims) { c.Attributes["subject.id"] = "x" }, ErrMalformed},
		{"name with a blank", func(c *claims) { c.Attributes["role "] = "x" }, ErrMalformed},
		{"name with NUL", func(c *claims) { c.Attributes["role\x00"] = "x" }, ErrMalformed},
		{"name empty", func(c *claims) { c.Attributes[""] = "x" }, ErrMalformed},
		{"name of 65 bytes", func(c *claims) { c.Attributes[strings.Repeat("a", 65)] = "x" }, ErrMalformed},
		{"65 attributes", func(c *claims) {
			for i := range 64 {
				c.Attributes[fmt.Sprintf("a%d", i)] = true
			}
		}, ErrMalformed},
		{"attributes above 3 KiB", func(c *claims) { c.Attributes["x"] = strings.Repeat("x", 3<<10) }, ErrMalformed},
		{"no attributes but null", func(c *claims) { c.Attributes = nil }, nil}, // written as an empty map
	}
	for _, tt := range claimTests {
		t.Run(tt.name, func(t *testing.T) {
			c := goodClaims(authority, node)
			tt.edit(&c)
			if err := verify(sealed(t, authority, encode(&c), credentialAAD, nil)); !errors.Is(err, tt.want) {
				t.Errorf("got %v, want %v", err, tt.want)
			}
		})
	}

	good := goodClaims(authority, node)
	payload := encode(&good)
	envelopes := []struct {
		name string
		raw  []byte
		want error
	}{
		{"empty", nil, ErrMalformed},
		{"signed by another", sealed(t, other, payload, credentialAAD, nil), ErrSignature},
		{"signed as another type", sealed(t, authority, payload, []byte("portal/attestation/v1"), nil), ErrSignature},
		{"signed as no type", sealed(t, authority, payload, nil, nil), ErrSignature},
		{"of another content type", sealed(t, authority, payload, credentialAAD, func(h *cose.Headers) {
			h.Protected[cose.HeaderLabelType] = "application/cwt"
		}), ErrMalformed},
		{"with a key id", sealed(t, authority, payload, credentialAAD, func(h *cose.Headers) {
			h.Unprotected = cose.UnprotectedHeader{cose.HeaderLabelKeyID: []byte("k")}
		}), ErrMalformed},
		{"with a critical header", sealed(t, authority, payload, credentialAAD, func(h *cose.Headers) {
			h.Protected[cose.HeaderLabelCritical] = []any{cose.HeaderLabelType}
		}), ErrMalformed},
		{"an unknown claim", sealed(t, authority, append([]byte{0xaa}, append(payload[1:], 0x18, 99, 0x01)...), credentialAAD, nil), ErrMalformed},
		{"a claim twice", sealed(t, authority, append([]byte{0xaa}, append(payload[1:], 0x07, 0x40)...), credentialAAD, nil), ErrMalformed},
		{"trailing byte in the claims", sealed(t, authority, append(slices.Clone(payload), 0), credentialAAD, nil), ErrMalformed},
		{"tagged", append([]byte{0xd2}, sealed(t, authority, payload, credentialAAD, nil)...), ErrMalformed},
		{"trailing byte", append(sealed(t, authority, payload, credentialAAD, nil), 0), ErrMalformed},
		{"too long", make([]byte, MaxCredential+1), ErrMalformed},
	}
	for _, tt := range envelopes {
		t.Run(tt.name, func(t *testing.T) {
			if err := verify(tt.raw); !errors.Is(err, tt.want) {
				t.Errorf("got %v, want %v", err, tt.want)
			}
		})
	}
}

func TestAlteredOrReencodedCredentialIsRefused(t *testing.T) {
	authority, node := newSelf(t), newSelf(t)
	trust := NewTrust(authority.ID())
	raw := issueTo(t, authority, node, Attributes{"role": "agent"}, noon, noon.Add(time.Hour)).Raw()
	accepted := func(raw []byte) bool {
		_, err := trust.Verify(raw, authority.History(), node.ID(), node.Latest(), noon)
		return err == nil
	}
	for i := range raw {
		for bit := range 8 {
			altered := slices.Clone(raw)
			altered[i] ^= 1 << bit
			if accepted(altered) {
				t.Fatalf("accepted with bit %d of byte %d altered", bit, i)
			}
		}
	}
	for n := range raw {
		if accepted(raw[:n]) {
			t.Fatalf("accepted when cut to %d bytes", n)
		}
	}
	// Longer length prefixes of payload and signature, which the signature does
	// not cover and go-cose accepts.
	signature := bytes.LastIndex(raw, []byte{0x58, 0x40})
	longer := slices.Concat(raw[:signature], []byte{0x59, 0, 0x40}, raw[signature+2:])
	var m cose.UntaggedSign1Message
	if err := m.UnmarshalCBOR(longer); err != nil {
		t.Fatalf("go-cose refuses it too, so this test shows nothing: %v", err)
	}
	if accepted(longer) {
		t.Error("accepted with a longer length of the signature")
	}
}

func TestTrustCountsOnlyPinnedAuthorities(t *testing.T) {
	a, b, node := newSelf(t), newSelf(t), newSelf(t)
	c := issueTo(t, b, node, nil, noon, noon.Add(time.Hour))
	check := func(trust *Trust, want []ID) {
		t.Helper()
		_, err := trust.Verify(c.Raw(), b.History(), node.ID(), node.Latest(), noon)
		var e *UntrustedError
		if !errors.As(err, &e) || e.Issuer != b.ID() || !slices.Equal(e.Trusted, want) {
			t.Errorf("got %v", err)
		}
	}
	check(new(Trust), nil)
	trust := NewTrust(a.ID(), a.ID())
	check(trust, []ID{a.ID()})
	trust.Pin(b.ID())
	if _, err := trust.Verify(c.Raw(), b.History(), node.ID(), node.Latest(), noon); err != nil {
		t.Errorf("after Pin: %v", err)
	}
	if got := trust.Authorities(); !slices.Equal(got, []ID{a.ID(), b.ID()}) {
		t.Errorf("Authorities() = %v", got)
	}
	if _, err := trust.Verify(c.Raw(), a.History(), node.ID(), node.Latest(), noon); !errors.Is(err, ErrMalformed) {
		t.Errorf("with the history of another authority: %v", err)
	}
	if _, err := trust.Verify(c.Raw(), nil, node.ID(), node.Latest(), noon); err != nil && !errors.Is(err, ErrMalformed) {
		t.Errorf("without a history: %v", err)
	} else if err == nil {
		t.Error("accepted without the issuer's history")
	}
	// A credential of a, with the name of b in it, signed by a.
	forged := goodClaims(b, node)
	if _, err := trust.Verify(sealed(t, a, encode(&forged), credentialAAD, nil), a.History(), node.ID(), node.Latest(), noon); err == nil {
		t.Error("a's signature counts for a credential in b's name")
	}
}

func TestCredentialCountsFromAMinuteBeforeItsBeginningUntilItsExpiry(t *testing.T) {
	authority, node := newSelf(t), newSelf(t)
	c := issueTo(t, authority, node, nil, noon, noon.Add(2*time.Second))
	for _, tt := range []struct {
		at    time.Duration
		valid bool
		early bool
	}{
		{-61 * time.Second, false, true},
		{-60*time.Second - time.Millisecond, false, true},
		{-60 * time.Second, true, false},
		{0, true, false},
		{2*time.Second - time.Millisecond, true, false},
		{2 * time.Second, false, false},
		{time.Hour, false, false},
	} {
		_, err := NewTrust(authority.ID()).Verify(c.Raw(), authority.History(), node.ID(), node.Latest(), noon.Add(tt.at))
		var e *ExpiredError
		if tt.valid != (err == nil) || !tt.valid && (!errors.As(err, &e) || e.Early() != tt.early) {
			t.Errorf("at %v: %v", tt.at, err)
		}
	}
}

func TestErrorsOfTimeNameBothTimes(t *testing.T) {
	late := (&ExpiredError{"credential", noon, noon.Add(time.Hour), noon.Add(63 * time.Minute)}).Error()
	if want := "the credential expired at 2026-11-23T13:00:00Z, 3m0s ago by this host's clock"; late != want {
		t.Errorf("%q", late)
	}
	early := (&ExpiredError{"credential", noon, noon.Add(time.Hour), noon.Add(-5 * time.Minute)}).Error()
	if want := "the credential is valid from 2026-11-23T12:00:00Z, and this host's clock says 2026-11-23T11:55:00Z: check both clocks"; early != want {
		t.Errorf("%q", early)
	}
}

func TestRotationOfTheAuthorityEndsCredentialsOfTheOldKey(t *testing.T) {
	authority, node := newSelf(t), newSelf(t)
	trust := NewTrust(authority.ID())
	verify := func(c *Credential, history []byte) error {
		_, err := trust.Verify(c.Raw(), history, node.ID(), node.Latest(), noon)
		return err
	}
	old := issueTo(t, authority, node, nil, noon, noon.Add(time.Hour))
	oldHistory := authority.History()
	if err := verify(old, oldHistory); err != nil {
		t.Fatal(err)
	}
	rotate(t, authority)
	if err := verify(old, oldHistory); err != nil {
		t.Errorf("before the rotation is seen: %v", err)
	}
	fresh := issueTo(t, authority, node, nil, noon, noon.Add(time.Hour))
	if err := verify(fresh, oldHistory); !errors.Is(err, ErrSignature) {
		t.Errorf("the new key with the old history: %v", err)
	}
	if err := verify(fresh, authority.History()); err != nil {
		t.Errorf("the new key: %v", err)
	}
	if err := verify(old, oldHistory); !errors.Is(err, ErrSignature) {
		t.Errorf("the old key after the rotation was seen: %v", err)
	}
	if err := verify(fresh, oldHistory); err != nil {
		t.Errorf("the longest history seen counts, not the one shown: %v", err)
	}
}

func TestForkOfAnAuthorityIsRefused(t *testing.T) {
	authority, node := newSelf(t), newSelf(t)
	twin := new(Self)
	twin.state.Store(authority.state.Load())
	rotate(t, authority)
	rotate(t, twin)
	trust := NewTrust(authority.ID())
	one := issueTo(t, authority, node, nil, noon, noon.Add(time.Hour))
	if _, err := trust.Verify(one.Raw(), authority.History(), node.ID(), node.Latest(), noon); err != nil {
		t.Fatal(err)
	}
	two := issueTo(t, twin, node, nil, noon, noon.Add(time.Hour))
	if _, err := trust.Verify(two.Raw(), twin.History(), node.ID(), node.Latest(), noon); !errors.Is(err, ErrFork) {
		t.Errorf("got %v", err)
	}
}

func TestLearnTakesOnlyLongerHistoriesOfPinnedAuthorities(t *testing.T) {
	authority, twin, stranger := newSelf(t), new(Self), newSelf(t)
	twin.state.Store(authority.state.Load())
	shorter := authority.History()
	rotate(t, authority)
	rotate(t, twin)
	trust := NewTrust(authority.ID())
	var untrusted *UntrustedError
	for _, tt := range []struct {
		what    string
		history []byte
		good    func(error) bool
	}{
		{"the shorter", shorter, func(err error) bool { return err == nil }},
		{"the longer", authority.History(), func(err error) bool { return err == nil }},
		{"the shorter again", shorter, func(err error) bool { return err == nil }},
		{"a fork", twin.History(), func(err error) bool { return errors.Is(err, ErrFork) }},
		{"a stranger's", stranger.History(), func(err error) bool { return errors.As(err, &untrusted) }},
		{"none", nil, func(err error) bool { return errors.Is(err, ErrMalformed) }},
	} {
		if err := trust.Learn(tt.history); !tt.good(err) {
			t.Errorf("%s: %v", tt.what, err)
		}
	}
	if got := trust.seen[authority.ID()]; len(trust.seen) != 1 || string(got.raw) != string(authority.History()) {
		t.Error("the longest is not what is known")
	}
}

func TestIssueRefusesWhatNoVerifierTakes(t *testing.T) {
	authority, node := newSelf(t), newSelf(t)
	many := Attributes{}
	for i := range maxAttributes + 1 {
		many[fmt.Sprintf("a%d", i)] = true
	}
	hour := noon.Add(time.Hour)
	for name, tt := range map[string]struct {
		attrs    Attributes
		from, to time.Time
	}{
		"id":               {Attributes{"id": "x"}, noon, hour},
		"authority":        {Attributes{"authority": "x"}, noon, hour},
		"node":             {Attributes{"node": "x"}, noon, hour},
		"int":              {Attributes{"level": 1}, noon, hour},
		"float":            {Attributes{"level": 1.0}, noon, hour},
		"any list":         {Attributes{"l": []any{"a"}}, noon, hour},
		"nil":              {Attributes{"l": nil}, noon, hour},
		"not UTF-8":        {Attributes{"s": "\xff"}, noon, hour},
		"list not UTF-8":   {Attributes{"s": []string{"\xff"}}, noon, hour},
		"bad name":         {Attributes{"1a": true}, noon, hour},
		"too many":         {many, noon, hour},
		"too large":        {Attributes{"s": strings.Repeat("x", 3<<10)}, noon, hour},
		"serve authority":  {Attributes{"serve": []string{"authority/*"}}, noon, hour},
		"serve wildcard":   {Attributes{"serve": []string{"a/*/b"}}, noon, hour},
		"name with a star": {Attributes{"name": "a/*"}, noon, hour},
		"no time":          {nil, noon, noon},
		"backwards":        {nil, hour, noon},
		"before 1970":      {nil, time.Unix(-1, 0), noon},
		"after 9999":       {nil, noon, time.Date(10000, 1, 1, 0, 0, 0, 0, time.UTC)},
		"zero time":        {nil, time.Time{}, noon},
	} {
		if c, err := authority.Issue(node.ID(), node.Latest(), tt.attrs, tt.from, tt.to); err == nil {
			t.Errorf("%s: issued %v", name, c.Attributes)
		}
	}
	full := Attributes{"s": strings.Repeat("x", maxAttributeBytes-6)}
	c := issueTo(t, authority, node, full, noon, hour)
	if len(c.Raw()) > MaxCredential {
		t.Errorf("the largest credential takes %d bytes", len(c.Raw()))
	}
}

func TestServeMatchesWholeNamesAndTrailingWildcards(t *testing.T) {
	c := &Credential{Attributes: Attributes{"serve": []string{"orders-db", "payments/*", "a/b/*"}}}
	for name, want := range map[string]bool{
		"orders-db": true, "orders-db/x": false, "orders": false, "orders-db2": false,
		"payments/a": true, "payments/a/b": true, "payments": false, "payments/": false, "paymentsx": false, "payments2/a": false,
		"a/b/c": true, "a/b": false, "a/c": false, "payments/*": false, "authority": false, "": false, "PAYMENTS/a": false,
	} {
		if got := c.MayServe(name); got != want {
			t.Errorf("MayServe(%q) = %v", name, got)
		}
	}
	none := (*Credential)(nil)
	if none.MayServe("a") || none.Relay() || none.Name() != "" || none.Serve() != nil || none.Raw() != nil {
		t.Error("no credential grants something")
	}
}

func TestFreeAttributeNames(t *testing.T) {
	for _, name := range []string{"role", "Role", "_x", "a-b_9", strings.Repeat("a", 64), "ID"} {
		if err := ValidAttribute(name); err != nil {
			t.Error(err)
		}
	}
	for _, name := range []string{"id", "name", "authority", "serve", "relay", "node", "", "9a", "-a", "a.b", "a b", "é", strings.Repeat("a", 65)} {
		if ValidAttribute(name) == nil {
			t.Errorf("%q is free", name)
		}
	}
}

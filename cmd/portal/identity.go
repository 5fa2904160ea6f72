package main

import (
	"errors"
	"fmt"
	"runtime"
	"runtime/debug"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/portal-tunnel/portal/identity"
)

// showIdentity prints the identifier alone on stdout, for scripts and pins, and
// the rest for people. The identity is made when there is none.
func showIdentity(s *session, home string) error {
	h, err := s.openHome(home)
	if err != nil {
		return err
	}
	self, err := h.Self()
	if err != nil {
		return err
	}
	m, err := h.Membership()
	if err != nil {
		return err
	}
	var hosts *identity.ID
	switch a, err := h.Authority(false); {
	case err == nil:
		hosts = authorityDocument(a.ID())
	case !errors.Is(err, identity.ErrNoAuthority):
		return err
	}
	if s.json {
		doc := struct {
			ID        identity.ID  `json:"id"`
			Home      string       `json:"home"`
			Authority *identity.ID `json:"authority,omitempty"`
			Name      string       `json:"name,omitempty"`
			Ways      []string     `json:"ways,omitempty"`
			Hosts     *identity.ID `json:"hosts_authority,omitempty"`
		}{ID: self.ID(), Home: h.Dir(), Hosts: hosts}
		if m != nil {
			doc.Authority, doc.Name = &m.Authority, m.Name
			for _, w := range m.Ways {
				doc.Ways = append(doc.Ways, w.String())
			}
		}
		return s.document(doc)
	}
	if err := s.print("%s\n", self.ID()); err != nil {
		return err
	}
	switch {
	case m == nil:
		s.say("home %s; no member of an authority yet", plain(h.Dir()))
	default:
		s.say("home %s; %s of authority %s", plain(h.Dir()), memberName(m.Name), m.Authority)
	}
	if hosts != nil {
		s.say("it holds authority %s: --trust and tickets name it", hosts)
	}
	return nil
}

// memberName is a member's name as sentences have it.
func memberName(name string) string {
	if name == "" {
		return "member"
	}
	return fromPeer(name)
}

// credentialDocument is one credential in a listing.
type credentialDocument struct {
	Subject    identity.ID         `json:"subject"`
	Issuer     identity.ID         `json:"issuer"`
	Name       string              `json:"name,omitempty"`
	Attributes identity.Attributes `json:"attributes"`
	Serve      []string            `json:"serve,omitempty"`
	Relay      bool                `json:"relay,omitempty"`
	NotBefore  time.Time           `json:"not_before"`
	Expires    time.Time           `json:"expires"`
	Expired    bool                `json:"expired"`
	Serial     string              `json:"serial"`
}

// listCredentials lists what this home holds: one credential at most. stdout has
// only the list.
func listCredentials(s *session, home string) error {
	h, err := s.openHome(home)
	if err != nil {
		return err
	}
	self, err := h.Self()
	if err != nil {
		return err
	}
	list := []credentialDocument{}
	if c := self.Credential(); c != nil {
		list = append(list, credentialDocument{
			Subject: c.Subject, Issuer: c.Issuer, Name: c.Name(), Attributes: free(c.Attributes), Serve: c.Serve(), Relay: c.Relay(),
			NotBefore: c.NotBefore.UTC(), Expires: c.Expires.UTC(), Expired: !time.Now().Before(c.Expires), Serial: fmt.Sprintf("%x", c.Serial),
		})
	}
	if s.json {
		return s.document(list)
	}
	if len(list) == 0 {
		s.say("no credential in %s; `portal enroll` with a ticket gets one", plain(h.Dir()))
		return nil
	}
	w := tabwriter.NewWriter(s.stdout, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "NAME\tSUBJECT\tISSUER\tSERVE\tATTRIBUTES\tEXPIRES")
	for _, c := range list {
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t%s\n", cell(c.Name), c.Subject.Short(), c.Issuer.Short(),
			cell(strings.Join(c.Serve, ",")), cell(attributeText(c.Attributes, plain)), when(c.Expires))
	}
	return w.Flush()
}

// free are the attributes that an authority gives freely: those that are shown
// in columns of their own are left out.
func free(attrs identity.Attributes) identity.Attributes {
	out := make(identity.Attributes)
	for name, v := range attrs {
		if !identity.Reserved(name) {
			out[name] = v
		}
	}
	return out
}

// cell is a text in a listing: all of it, for a listing is data, and no more than
// one column. A dash stands where there is none.
func cell(text string) string {
	if text == "" {
		return "-"
	}
	return strings.ReplaceAll(plain(text), "\t", `\t`)
}

// when is a moment in a listing.
func when(t time.Time) string { return t.UTC().Format(time.RFC3339) }

// version is set by the linker; without it the build says what it knows.
var version string

func showVersion(s *session) error {
	v, revision := version, ""
	if b, ok := debug.ReadBuildInfo(); ok {
		if v == "" {
			v = b.Main.Version
		}
		for _, setting := range b.Settings {
			if setting.Key == "vcs.revision" {
				revision = setting.Value
			}
		}
	}
	if v == "" {
		v = "(devel)"
	}
	if s.json {
		return s.document(map[string]string{"version": v, "revision": revision, "go": runtime.Version(), "platform": runtime.GOOS + "/" + runtime.GOARCH})
	}
	return s.print("portal %s %s %s/%s\n", v, runtime.Version(), runtime.GOOS, runtime.GOARCH)
}

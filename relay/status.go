package relay

import (
	"cmp"
	"slices"

	"github.com/portal-tunnel/portal/identity"
)

// Status is what a relay holds at one moment, for whoever runs it.
type Status struct {
	Members   int // identities that are here with a credential
	Strangers int // and those without one: authorities, and who asks for one
	Lanes     int // joined or about to be
	Names     []Name
}

// Name is one that is served here.
type Name struct {
	Authority identity.ID // within which it is that name
	Name      string
	Outlets   int // how many serve it
}

// Status looks at what is here. Names are in order.
func (s *Server) Status() Status {
	s.init()
	s.mu.Lock()
	st := Status{Lanes: s.lanes}
	for key, m := range s.members {
		switch {
		case m.refs == 0: // remembered, not here
		case key.authority.IsZero():
			st.Strangers++
		default:
			st.Members++
		}
	}
	for key, p := range s.pools {
		if n := len(p.members); n > 0 {
			st.Names = append(st.Names, Name{key.authority, key.name, n})
		}
	}
	s.mu.Unlock()
	slices.SortFunc(st.Names, func(a, b Name) int {
		return cmp.Or(cmp.Compare(a.Name, b.Name), slices.Compare(a.Authority[:], b.Authority[:]))
	})
	return st
}

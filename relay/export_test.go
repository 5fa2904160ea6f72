package relay

// Registrations is how many serve a name, of whatever authority.
func (s *Server) Registrations(name string) (n int) {
	s.init()
	s.mu.Lock()
	defer s.mu.Unlock()
	for key, p := range s.pools {
		if key.name == name {
			n += len(p.members)
		}
	}
	return n
}

// Held is what the relay keeps: ids that are expected, pools, members, control
// channels.
func (s *Server) Held() int {
	s.init()
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.expected) + len(s.pools) + len(s.members) + len(s.controls)
}

// CarrierIdle is how long a carrier is left without lanes and a registration.
var CarrierIdle = &carrierIdle

// Orderly is what a log says of an end.
var Orderly = orderly

// CarrierStreams is how many streams of a carrier there may be.
const CarrierStreams = carrierStreams

package tunnels

import "testing"

func TestAMissingPeerIsNamedWithItsInstallation(t *testing.T) {
	t.Setenv("PATH", t.TempDir())
	for _, s := range Systems {
		err := s.Absent()
		if s.Peer && s.Key != "ssh" && err == nil {
			t.Errorf("%s is found in an empty directory", s.Name)
		}
		if s.Peer && s.Install == "" || !s.Peer && err != nil {
			t.Errorf("%s: %v", s.Name, err)
		}
	}
}

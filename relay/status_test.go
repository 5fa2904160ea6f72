package relay_test

import (
	"reflect"
	"testing"
	"testing/synctest"

	"github.com/portal-tunnel/portal/relay"
)

func TestStatusCountsWhatIsHere(t *testing.T) {
	in(t, func(w *town) {
		s, _ := w.relay(nil)
		if st := s.Status(); !reflect.DeepEqual(st, relay.Status{}) {
			t.Errorf("before anybody is here: %+v", st)
		}
		_, stop := w.outlet("db", w.member(serves("db", "a")), echoing, nil)
		w.outlet("db", w.member(serves("db", "a")), echoing, nil)
		w.outlet("a", w.member(serves("db", "a")), echoing, nil)
		w.client(w.authority, nil).Listen(relay.AuthorityName, nil)
		w.client(w.stranger(), nil)
		bot := w.member(agent)
		c := w.dial(w.inlet("db", bot, w.client(bot, nil)))
		synctest.Wait()
		id := w.authority.ID()
		want := relay.Status{Members: 4, Strangers: 2, Lanes: 1, Names: []relay.Name{
			{Authority: id, Name: "a", Outlets: 1}, {Authority: id, Name: relay.AuthorityName, Outlets: 1}, {Authority: id, Name: "db", Outlets: 2},
		}}
		if st := s.Status(); !reflect.DeepEqual(st, want) {
			t.Errorf("got  %+v\nwant %+v", st, want)
		}
		c.Close()
		stop()
		synctest.Wait()
		if st := s.Status(); st.Names[2].Outlets != 1 {
			t.Errorf("one outlet is gone: %+v", st)
		}
	})
}

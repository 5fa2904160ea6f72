package routing

import (
	"errors"
	"slices"
	"testing"
	"testing/synctest"
)

func TestWatchersAreToldOnceInOrder(t *testing.T) {
	bubble(t, func(t *testing.T, n *Node) {
		reason := errors.New("reason")
		a := spawn(t, n, "a", &probe{}, nil)
		var told []string
		var err error
		n.Watch("a", func(e error) { told, err = append(told, "first"), e })
		n.Watch("a", func(error) { told = append(told, "left") })()
		n.Watch("a", func(error) { told = append(told, "second") })
		stop := n.Watch("a", func(error) { told = append(told, "third") })
		a.Stop(reason)
		synctest.Wait()
		stop()
		if !slices.Equal(told, []string{"first", "second", "third"}) || err != reason {
			t.Errorf("told %v, %v", told, err)
		}
	})
}

func TestWatchOfNobodyIsToldAtOnce(t *testing.T) {
	bubble(t, func(t *testing.T, n *Node) {
		var told error
		n.Watch("nobody", func(err error) { told = err })()
		want(t, told, ErrNoActor)
	})
}

func TestWatcherMaySpawnAtTheAddressAgain(t *testing.T) {
	bubble(t, func(t *testing.T, n *Node) {
		a := spawn(t, n, "a", &probe{}, nil)
		n.Watch("a", func(error) { spawn(t, n, "a", &probe{}, nil) })
		a.Stop(nil)
		synctest.Wait()
		if got, _ := n.lookup("a"); got == nil || got == a {
			t.Errorf("at the address: %v", got)
		}
	})
}

func TestActorIsToldInATurnOfItsOwn(t *testing.T) {
	bubble(t, func(t *testing.T, n *Node) {
		g := newGate()
		var told []error
		watcher := spawn(t, n, "watcher", g, nil)
		a := spawn(t, n, "a", &probe{}, nil)
		reason := errors.New("reason")
		watcher.Watch("a", func(err error) { told = append(told, err) })
		want(t, n.Post(to("watcher", "")), nil)
		synctest.Wait()
		a.Stop(reason)
		watcher.Watch("nobody", func(err error) { told = append(told, err) })
		synctest.Wait()
		if len(told) != 0 {
			t.Error("told while a turn was running")
		}
		close(g.let)
		synctest.Wait()
		if len(told) != 2 || !slices.Contains(told, reason) || !errors.Is(errors.Join(told...), ErrNoActor) {
			t.Errorf("told %v", told)
		}
		if watcher.rare != nil {
			t.Errorf("the watcher keeps %+v", watcher.rare)
		}
	})
}

func TestWatchEndsWithItsActor(t *testing.T) {
	bubble(t, func(t *testing.T, n *Node) {
		a := spawn(t, n, "a", &probe{}, nil)
		for range 100 {
			w := spawn(t, n, "", &probe{}, nil)
			w.Watch("a", func(error) { t.Error("a stopped actor was told") })
			w.Stop(nil)
		}
		synctest.Wait()
		if a.rare != nil {
			t.Errorf("a long-lived actor remembers the watches of those who have stopped: %+v", a.rare)
		}
	})
}

func TestWatchThatWasStoppedIsNotCalled(t *testing.T) {
	bubble(t, func(t *testing.T, n *Node) {
		g := newGate()
		w := spawn(t, n, "w", g, nil)
		a := spawn(t, n, "a", &probe{}, nil)
		before := w.Watch("a", func(error) { t.Error("told after stop") })
		before()
		queued := w.Watch("a", func(error) { t.Error("told after stop") })
		want(t, n.Post(to("w", "")), nil)
		synctest.Wait()
		a.Stop(nil)
		synctest.Wait()
		queued() // waits for a turn of w already
		close(g.let)
	})
}

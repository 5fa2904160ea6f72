package abac

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"reflect"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

func mustParse(t testing.TB, src string) *Policy {
	t.Helper()
	p, err := Parse("p.cedar", []byte(src))
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func mustShort(t testing.TB, expr string) *Policy {
	t.Helper()
	p, err := Short("open", "orders-db", expr)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// ask is a peer with the given attributes that opens orders-db.
func ask(principal map[string]any) Request {
	return Request{
		Principal: principal, PrincipalID: "PDB4",
		Action:   "open",
		Resource: map[string]any{"team": "payments"}, ResourceID: "orders-db",
		Context: map[string]any{"via": "relay", "claimed": map[string]any{"tool": "psql"}},
	}
}

func TestNothingIsPermittedUnlessAPolicySaysSo(t *testing.T) {
	for name, p := range map[string]*Policy{
		"nil":            nil,
		"zero":           {},
		"joined nothing": Join(),
		"joined nil":     Join(nil, nil),
		"only forbids":   mustParse(t, `forbid(principal, action, resource) when { false };`),
		"other action":   mustParse(t, `permit(principal, action == Action::"serve", resource);`),
		"other resource": mustParse(t, `permit(principal, action, resource == Name::"x");`),
		"false":          mustShort(t, `false`),
	} {
		if d := p.Decide(ask(nil)); d.Allow || len(d.Policies) > 0 {
			t.Errorf("%s: %+v", name, d)
		} else if d.Reason() != "no policy permits it" {
			t.Errorf("%s: %q", name, d.Reason())
		}
	}
}

func TestAttributesOfEveryTypeReachPolicies(t *testing.T) {
	r := ask(map[string]any{"role": "agent", "level": int64(3), "admin": false, "serve": []string{"a", "b/*"}, "a-b": "x"})
	for expr, want := range map[string]bool{
		`principal.role == "agent"`:                                       true,
		`principal.role != "agent"`:                                       false,
		`principal.level > 2 && !principal.admin`:                         true,
		`principal.serve.contains("b/*")`:                                 true,
		`principal.serve.contains("c")`:                                   false,
		`principal["a-b"] == "x"`:                                         true,
		`principal has role && !(principal has x)`:                        true,
		`resource.team == "payments"`:                                     true,
		`context.claimed.tool == "psql"`:                                  true,
		`principal == Node::"PDB4"`:                                       true,
		`principal == Node::"PDB5"`:                                       false,
		`resource == Name::"orders-db"`:                                   true,
		`action == Action::"open"`:                                        true,
		`principal is Node && resource is Name`:                           true,
		`["agent", "bot"].contains(principal.role)`:                       true,
		`principal.role like "ag*"`:                                       true,
		`context has claimed.tool`:                                        true,
		"principal.level == 3 // three":                                   true,
		"/* a */ true":                                                    true,
		`principal.role == "}; permit(principal,action,resource) when {"`: false,
	} {
		if d := mustShort(t, expr).Decide(r); d.Allow != want || len(d.Errors) > 0 {
			t.Errorf("%s: %+v", expr, d)
		}
	}
}

func TestShortPermitsOnlyItsActionOnItsResource(t *testing.T) {
	// The name is data: what would be syntax in a policy's text stays a name.
	for _, name := range []string{"orders-db", `a"b`, `x") when { true }; //`, "a\nb", "\\", "", "ü\x00\xff"} {
		p, err := Short("open", name, "true")
		if err != nil {
			t.Fatal(err)
		}
		r := Request{PrincipalID: "P", Action: "open", ResourceID: name}
		if d := p.Decide(r); !d.Allow || !slices.Equal(d.Policies, []string{"allow[0]"}) {
			t.Errorf("%q: %+v", name, d)
		}
		other := r
		other.ResourceID += "x"
		if p.Decide(other).Allow {
			t.Errorf("%q permits %q", name, other.ResourceID)
		}
		other = r
		other.Action = "serve"
		if p.Decide(other).Allow {
			t.Errorf("%q permits serve", name)
		}
	}
	if _, err := Short("opn", "x", "true"); err == nil {
		t.Error("an unknown action was accepted")
	}
}

func TestShortAnyPermitsOnlyItsAction(t *testing.T) {
	p, err := ShortAny("serve", `principal.role == "agent"`)
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"orders-db", "a/b", ""} {
		r := Request{PrincipalID: "P", Principal: map[string]any{"role": "agent"}, Action: "serve", ResourceID: name}
		if !p.Decide(r).Allow {
			t.Errorf("%q is not permitted", name)
		}
		r.Action = "open"
		if p.Decide(r).Allow {
			t.Errorf("open of %q is permitted", name)
		}
		r.Action, r.Principal = "serve", map[string]any{"role": "guest"}
		if p.Decide(r).Allow {
			t.Errorf("a guest may serve %q", name)
		}
	}
	if _, err := ShortAny("serve", "true }; permit(principal, action, resource) when { true"); err == nil {
		t.Error("the text left its wrapper")
	}
}

func TestForbidOverridesEveryPermit(t *testing.T) {
	p := Join(mustShort(t, "true"), mustParse(t, `
		@id("no guests") forbid(principal, action, resource) when { principal.role == "guest" };
		permit(principal, action, resource);`))
	if d := p.Decide(ask(map[string]any{"role": "agent"})); !d.Allow || !slices.Equal(d.Policies, []string{"allow[0]", "p.cedar:policy1"}) {
		t.Errorf("%+v", d)
	}
	d := p.Decide(ask(map[string]any{"role": "guest"}))
	if d.Allow || !slices.Equal(d.Policies, []string{"no guests"}) || d.Reason() != "policy no guests forbids it" {
		t.Errorf("%+v: %s", d, d.Reason())
	}
}

func TestForbidThatCannotBeEvaluatedRefuses(t *testing.T) {
	const forbid = `@id("suspended") forbid(principal, action == Action::"open", resource) when { principal.suspended };`
	for name, attrs := range map[string]map[string]any{
		"missing":    {"role": "agent"},
		"wrong type": {"role": "agent", "suspended": "yes"},
	} {
		d := Join(mustShort(t, `principal.role == "agent"`), mustParse(t, forbid)).Decide(ask(attrs))
		if d.Allow || !slices.Equal(d.Policies, []string{"suspended"}) || len(d.Errors) != 1 {
			t.Errorf("%s: %+v", name, d)
		}
		if _, has := attrs["suspended"]; !has && !slices.Equal(d.Missing, []string{"suspended"}) {
			t.Errorf("%s: missing %q", name, d.Missing)
		}
	}
	// One that is about something else is not evaluated and does not refuse.
	p := Join(mustShort(t, "true"), mustParse(t, `forbid(principal, action == Action::"serve", resource) when { principal.x };`))
	if d := p.Decide(ask(nil)); !d.Allow {
		t.Errorf("%+v", d)
	}
}

func TestPermitThatCannotBeEvaluatedDoesNotCount(t *testing.T) {
	p := Join(mustShort(t, `principal.role == "agent"`), mustShort(t, `principal.team == "db"`), mustShort(t, `principal.level + 9223372036854775807 > 0`))
	d := p.Decide(ask(map[string]any{"team": "db", "level": int64(5)}))
	if !d.Allow || !slices.Equal(d.Policies, []string{"allow[1]"}) {
		t.Errorf("%+v", d)
	}
	d = p.Decide(ask(map[string]any{"team": "web", "level": int64(5)}))
	if d.Allow || !slices.Equal(d.Missing, []string{"role"}) || len(d.Errors) != 2 {
		t.Errorf("%+v", d)
	}
	if want := `no policy permits it; principal does not have the attribute "role"`; d.Reason() != want {
		t.Errorf("%q", d.Reason())
	}
}

func TestMissingNamesWhatPermitsForThisRequestAskedFor(t *testing.T) {
	p := mustParse(t, `
		permit(principal, action == Action::"open", resource) when { principal.b == 1 && principal.a == "x" };
		permit(principal, action == Action::"open", resource) when { principal has c && principal.c };
		permit(principal, action == Action::"serve", resource) when { principal.other };
		permit(principal, action, resource == Name::"else") when { principal.elsewhere };`)
	d := p.Decide(ask(map[string]any{"a": "y"}))
	if d.Allow || !slices.Equal(d.Missing, []string{"b", "c"}) {
		t.Errorf("%+v", d)
	}
}

func TestDecisionsHoldNoValues(t *testing.T) {
	const secret = "s3cr3t-value"
	r := ask(map[string]any{"s": secret, "n": int64(987654321), "m": map[string]any{"k": secret}})
	r.Context["addr"] = secret
	for _, expr := range []string{
		`ip(principal.s).isLoopback()`, `decimal(context.addr).lessThan(decimal("1.0"))`, `datetime(principal.s) == datetime("2024-01-01")`,
		`principal.n * 9223372036854775807 > 0`, `principal.s > 3`, `principal.s + 1 == 2`, `principal.m.x == 1`, `principal.m`, `duration(principal.s).toDays() > 1`,
		`principal.getTag(principal.s) == "x"`, `Node::"other".role == "x"`, `principal.s in resource`, `principal.s.contains("x")`,
		`if principal.s then true else false`, `principal.absent == context.addr`,
	} {
		for _, p := range []*Policy{mustShort(t, expr), mustParse(t, `forbid(principal, action, resource) when { `+expr+` };`)} {
			d := p.Decide(r)
			if d.Allow || len(d.Errors) != 1 {
				t.Errorf("%s: %+v", expr, d)
			}
			if s := fmt.Sprintf("%+v %s", d, d.Reason()); strings.Contains(s, secret) || strings.Contains(s, "987654321") {
				t.Errorf("%s: %s", expr, s)
			}
		}
	}
}

func TestValuesOfUnknownTypesRefuse(t *testing.T) {
	cycle := map[string]any{}
	cycle["self"] = cycle
	p := mustShort(t, "true")
	for _, v := range []any{nil, 1, 1.5, uint64(1), int32(1), []any{"a"}, []int64{1}, []byte("x"), struct{}{}, time.Now(), errors.New("x"), cycle, map[string]any{"x": nil}, map[string]string{}} {
		for place, r := range map[string]Request{
			"principal": {Principal: map[string]any{"v": v}, Action: "open", ResourceID: "orders-db"},
			"resource":  {Resource: map[string]any{"v": v}, Action: "open", ResourceID: "orders-db"},
			"context":   {Context: map[string]any{"v": v}, Action: "open", ResourceID: "orders-db"},
		} {
			d := p.Decide(r)
			if d.Allow || len(d.Errors) != 1 || !strings.Contains(d.Reason(), place) {
				t.Errorf("%T in %s: %+v", v, place, d)
			}
		}
	}
	for _, v := range []any{"", int64(0), false, []string(nil), []string{"a", "a"}, map[string]any(nil), map[string]any{"x": map[string]any{"y": int64(1)}}} {
		if d := p.Decide(Request{Principal: map[string]any{"v": v}, Action: "open", ResourceID: "orders-db"}); !d.Allow {
			t.Errorf("%T: %+v", v, d)
		}
	}
}

// A comparison with an attribute that is not there is an error in Cedar, so
// whatever is built of such comparisons alone permits nothing.
func TestUnknownAttributesNeverPermit(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 2))
	var build func(depth int) string
	build = func(depth int) string {
		if depth == 0 {
			name := string(rune('a' + rng.IntN(26)))
			return []string{
				`principal.` + name + ` != "x"`, `!(principal.` + name + ` == "x")`, `"x" != principal.` + name, `principal.` + name + ` != principal.` + name,
				`!principal.` + name + `.contains("x")`, `!(principal.` + name + ` like "*")`, `principal.` + name + ` < 5`, `resource.` + name + ` != principal.` + name,
			}[rng.IntN(8)]
		}
		a, b := build(depth-1), build(depth-1)
		return []string{
			"(" + a + ") && (" + b + ")", "(" + a + ") || (" + b + ")", "!(" + a + ")", "if " + a + " then true else true", "(" + a + ") != (" + b + ")",
		}[rng.IntN(5)]
	}
	for range 500 {
		expr := build(rng.IntN(4))
		if d := mustShort(t, expr).Decide(Request{PrincipalID: "P", Action: "open", ResourceID: "orders-db"}); d.Allow {
			t.Fatalf("%s: %+v", expr, d)
		}
	}
}

func TestDecisionDoesNotDependOnOrder(t *testing.T) {
	rng := rand.New(rand.NewPCG(3, 4))
	conditions := []string{"true", "false", "principal.a == 1", "principal.a != 1", "principal.b", "!(principal has c)", "principal.c.contains(\"x\")", "context.via == \"relay\""}
	for range 200 {
		var ps []*Policy
		for i := range 1 + rng.IntN(6) {
			effect := "permit"
			if rng.IntN(4) == 0 {
				effect = "forbid"
			}
			annotation := fmt.Sprintf("@id(%q)", fmt.Sprint(i))
			if effect == "permit" && rng.IntN(2) == 0 {
				annotation += fmt.Sprintf(" @max_session(\"%dm\")", 1+rng.IntN(9))
			}
			ps = append(ps, mustParse(t, fmt.Sprintf("%s %s(principal, action, resource) when { %s };", annotation, effect, conditions[rng.IntN(len(conditions))])))
		}
		attrs := map[string]any{}
		for _, name := range []string{"a", "b", "c"} {
			if v := []any{int64(rng.IntN(2)), rng.IntN(2) == 0, []string{"x"}, "s", nil}[rng.IntN(5)]; v != nil {
				attrs[name] = v
			}
		}
		first := Join(ps...).Decide(ask(attrs))
		for range 5 {
			rng.Shuffle(len(ps), func(i, j int) { ps[i], ps[j] = ps[j], ps[i] })
			again := Join(ps...).Decide(ask(attrs))
			for _, d := range []*Decision{&first, &again} {
				slices.Sort(d.Policies)
				slices.Sort(d.Errors)
			}
			if !reflect.DeepEqual(first, again) {
				t.Fatalf("%+v\n%+v", first, again)
			}
		}
	}
}

func TestMaxSessionIsTheLeastOfThePermitsThatPermit(t *testing.T) {
	p := mustParse(t, `
		permit(principal, action, resource) when { principal.role == "agent" };
		@max_session("8h") permit(principal, action, resource) when { principal.role == "agent" };
		@max_session("1h30m") @note("short") permit(principal, action, resource) when { principal.temp };
		@max_session("1s") permit(principal, action == Action::"serve", resource);
		permit(principal, action, resource) when { principal.role == "owner" };`)
	for _, c := range []struct {
		attrs map[string]any
		want  time.Duration
	}{
		{map[string]any{"role": "agent"}, 8 * time.Hour},
		{map[string]any{"role": "agent", "temp": true}, 90 * time.Minute},
		{map[string]any{"role": "owner"}, 0},
	} {
		if d := p.Decide(ask(c.attrs)); !d.Allow || d.MaxSession != c.want {
			t.Errorf("%v: %+v", c.attrs, d)
		}
	}
}

func TestJoinNamesShortFormsByTheirPlace(t *testing.T) {
	a, b := mustShort(t, "true"), mustShort(t, "true")
	p := Join(a, mustParse(t, "permit(principal, action, resource);"), nil, b)
	if d := p.Decide(ask(nil)); !slices.Equal(d.Policies, []string{"allow[0]", "p.cedar:policy0", "allow[3]"}) {
		t.Errorf("%q", d.Policies)
	} else if want := "policies allow[0], p.cedar:policy0, allow[3] permit"; d.Reason() != want {
		t.Errorf("%q", d.Reason())
	}
	if d := b.Decide(ask(nil)); !slices.Equal(d.Policies, []string{"allow[0]"}) {
		t.Errorf("joining changed its argument: %q", d.Policies)
	}
}

func TestPolicyIsSafeForConcurrentUse(t *testing.T) {
	p := Join(mustShort(t, `principal.role == "agent"`), mustParse(t, `forbid(principal, action, resource) when { principal.serve.contains("x") };`))
	r := ask(map[string]any{"role": "agent", "serve": []string{"y"}})
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for range 200 {
				if !p.Decide(r).Allow {
					t.Error("refused")
					return
				}
			}
		})
	}
	wg.Wait()
}

func BenchmarkDecide(b *testing.B) {
	agent := ask(map[string]any{"id": "PDB4", "name": "bot", "authority": "PA6Z", "role": "agent", "serve": []string{"a", "b"}})
	for name, c := range map[string]struct {
		expr string
		r    Request
	}{
		"permit":  {`principal.role == "agent" && resource.team == "payments"`, agent},
		"refuse":  {`principal.role == "dba"`, agent},
		"missing": {`principal.level > 3`, agent},
	} {
		b.Run(name, func(b *testing.B) {
			p := mustShort(b, c.expr)
			b.ReportAllocs()
			for b.Loop() {
				p.Decide(c.r)
			}
		})
	}
}

package main

import (
	"context"
	"fmt"
	"os"
	"slices"
	"strings"

	"github.com/portal-tunnel/portal/tests/tunnels"
)

// systems are what is measured: what others are compared to, and tunnels.
var systems = append([]tunnels.System{
	{Key: "nothing", Name: bare, Is: "TCP to the target",
		Start: func(ctx context.Context, d *tunnels.Deployment) (string, error) { return d.Link(ctx, d.Target) }},
	{Key: "copy", Name: yardstick, Is: "a read and a write of up to 64 KiB in Go, twice; no cipher",
		Start: func(ctx context.Context, d *tunnels.Deployment) (string, error) { return forwarders(ctx, d, "copy") }},
	{Key: "splice", Name: "two forwarders, splice", Is: "the kernel moves the bytes; no cipher", Seldom: true, Descriptors: 6, // a pipe each way
		Start: func(ctx context.Context, d *tunnels.Deployment) (string, error) { return forwarders(ctx, d, "splice") }},
}, tunnels.Systems...)

const (
	bare      = "nothing in between"
	yardstick = "two forwarders, copy" // whose multiples the others are given in
)

// systemKeys are the names of all systems, or of those that a run takes when it is told none.
func systemKeys(all bool) (keys []string) {
	for _, s := range systems {
		if all || !s.Seldom {
			keys = append(keys, s.Key)
		}
	}
	return keys
}

func chooseSystems(names string) (chosen []tunnels.System, err error) {
	keys := strings.Split(names, ",")
	switch names {
	case "":
		keys = systemKeys(false)
	case "all":
		keys = systemKeys(true)
	}
	for _, k := range keys {
		i := slices.IndexFunc(systems, func(s tunnels.System) bool { return s.Key == k })
		if i < 0 {
			return nil, fmt.Errorf("no system %q; there are %s", k, strings.Join(systemKeys(true), ", "))
		}
		chosen = append(chosen, systems[i])
	}
	return chosen, nil
}

func forwarders(ctx context.Context, d *tunnels.Deployment, how string) (string, error) {
	path, err := os.Executable()
	if err != nil {
		return "", err
	}
	one := func(at *tunnels.Host, name, ip, to string) (string, error) {
		p, err := d.Run(at, name, path, "forward", how, ip, to)
		if err != nil {
			return "", err
		}
		return tunnels.Line(ctx, p, "^"+listening+`(\S+)$`)
	}
	exit, err := one(d.Far, "exit", d.Far.IP, d.Target)
	if err != nil {
		return "", err
	}
	if exit, err = d.Link(ctx, exit); err != nil {
		return "", err
	}
	return one(d.Near, "entry", tunnels.Loopback, exit)
}

package main

import "github.com/urfave/cli/v2"

// memberOptions say as whom a command acts.
type memberOptions struct {
	home      string
	ticket    string
	ephemeral bool
}

func memberFlags(c *cli.Context) memberOptions {
	return memberOptions{home: c.String("home"), ticket: c.String("ticket"), ephemeral: c.Bool("ephemeral")}
}

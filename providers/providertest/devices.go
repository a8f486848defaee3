// SPDX-License-Identifier: Apache-2.0

package providertest

import (
	"fmt"
	"io"
	"strings"

	"github.com/labfile/lab/providers"
)

func testConsole(b *bench) {
	g := gen("web", 1)
	b.up(b.spec(g))
	for _, p := range []providers.Provider{b.Provider, b.Other} {
		c, err := p.Console(b.ctx(), g)
		b.ok("Console", err)
		_, err = io.WriteString(c, "xyz")
		b.ok("typing", err)
		echo := make([]byte, 3)
		_, err = io.ReadFull(c, echo)
		b.ok("reading the echo", err)
		if string(echo) != "xyz" {
			b.Fatalf("echo %q, want %q", echo, "xyz")
		}
		b.ok("closing the console", c.Close())
	}
	b.state(g, providers.StateRunning)
	b.follow(g, func(log []byte) bool { return strings.Count(string(log), "xyz") == 2 })
}

func testLogs(b *bench) {
	g := gen("web", 1)
	b.up(b.spec(g))
	r, err := b.Provider.OpenLog(b.ctx(), g, providers.LogConsole)
	b.ok("OpenLog", err)
	defer r.Close()
	first, err := io.ReadAll(r)
	b.ok("reading the log", err)
	if !strings.Contains(string(first), Banner) {
		b.Fatalf("the log lacks the banner: %q", first)
	}
	b.press(g, "z")
	var more []byte
	b.until("the open log goes on", func() bool {
		text, err := io.ReadAll(r)
		b.ok("reading on", err)
		more = append(more, text...)
		return string(more) == "z"
	}, func() string { return fmt.Sprintf("read %q", more) })
	b.press(g, KeyOff)
	_, err = b.Provider.Wait(b.ctx(), g)
	b.ok("Wait", err)
	b.follow(g, func(log []byte) bool { return strings.HasSuffix(string(log), "z") })
}

func testCables(b *bench) {
	g := gen("web", 1)
	b.up(b.spec(g))
	if p, ok := b.Provider.(providers.Cabled); ok {
		for range 3 { // plugged, unplugged, plugged again
			c, err := p.DialNIC(b.ctx(), g)
			b.ok("DialNIC", err)
			b.ok("unplugging", c.Close())
		}
	}
	if p, ok := b.Provider.(providers.AgentDialer); ok {
		for range 3 {
			c, err := p.DialAgent(b.ctx(), g)
			b.ok("DialAgent", err)
			b.ok("hanging up", c.Close())
		}
	}
	b.state(g, providers.StateRunning)
	bare := b.spec(gen("bare", 1))
	bare.MAC, bare.Agent = "", false
	b.up(bare)
	if p, ok := b.Provider.(providers.Cabled); ok {
		if _, err := p.DialNIC(b.ctx(), bare.Generation); err == nil {
			b.Error("DialNIC to a machine without a network card succeeded")
		}
	}
	if p, ok := b.Provider.(providers.AgentDialer); ok {
		if _, err := p.DialAgent(b.ctx(), bare.Generation); err == nil {
			b.Error("DialAgent to a machine without the port succeeded")
		}
	}
}

// SPDX-License-Identifier: Apache-2.0

package memory

import (
	"context"
	"io"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/labfile/lab/internal/lab"
	"github.com/labfile/lab/providers"
	"github.com/labfile/lab/providers/providertest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var testImage = providers.Image{Digest: "sha256:" + strings.Repeat("1", 64), Arch: "amd64", Size: lab.MiB}

func TestConformance(t *testing.T) {
	deaf := testImage
	deaf.Digest = "sha256:" + strings.Repeat("2", 64)
	providertest.Run(t, func(t *testing.T) providertest.Host {
		p := New(Config{Program: func(s providers.Spec) Program {
			if s.Image.Digest == deaf.Digest {
				return Deaf
			}
			return Echo
		}})
		return providertest.Host{
			Provider: p, Other: p, Image: testImage, Deaf: deaf, Memory: lab.MiB, Patience: 10 * time.Second,
			Kill:         func(_ *testing.T, m providers.Machine) { p.Kill(m.Generation) },
			Pause:        func(_ *testing.T, m providers.Machine) { p.Pause(m.Generation, true) },
			Freeze:       func(_ *testing.T, m providers.Machine) { p.Pause(m.Generation, true) },
			Isolate:      func(_ *testing.T, m providers.Machine) { p.Isolate(m.Generation, true) },
			Halve:        func(_ *testing.T, g lab.Generation) { p.Break(g, "its creation was interrupted") },
			HalveDestroy: func(_ *testing.T, g lab.Generation) { p.Break(g, "its removal was interrupted") },
			Leftovers: func(t *testing.T) []string {
				ms, err := p.List(context.Background(), "")
				if err != nil {
					t.Fatal(err)
				}
				var left []string
				for _, m := range ms {
					left = append(left, m.Generation.String())
				}
				if p.temp != "" {
					left = append(left, p.temp)
				}
				return left
			},
		}
	})
}

func TestGuestEnds(t *testing.T) {
	g := lab.Generation{Lab: "shop-1f3a9c2b", Machine: "web", Number: 1}
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	// The guest echoes upper case on each of its three doors.
	p := New(Config{Program: func(providers.Spec) Program {
		return func(ctx context.Context, g *Guest) error {
			l, err := g.Listen(80)
			if err != nil {
				return err
			}
			defer l.Close()
			for _, accept := range []func() (io.ReadWriteCloser, error){
				func() (io.ReadWriteCloser, error) { return g.AcceptNIC() },
				func() (io.ReadWriteCloser, error) { return g.AcceptAgent() },
				func() (io.ReadWriteCloser, error) { return l.Accept() },
			} {
				c, err := accept()
				if err != nil {
					return err
				}
				b := make([]byte, 4)
				if _, err := io.ReadFull(c, b); err != nil {
					return err
				}
				if _, err := c.Write([]byte(strings.ToUpper(string(b)))); err != nil {
					return err
				}
				c.Close()
			}
			<-ctx.Done()
			return nil
		}
	}})
	spec := providers.Spec{Generation: g, Image: testImage, CPUs: 1, Memory: lab.MiB, MAC: "52:54:00:00:00:01", Agent: true}
	for _, err := range []error{p.Create(ctx, spec), p.Start(ctx, g)} {
		if err != nil {
			t.Fatal(err)
		}
	}
	nic, err := p.DialNIC(ctx, g)
	if err != nil {
		t.Fatal(err)
	}
	agent, err := p.DialAgent(ctx, g)
	if err != nil {
		t.Fatal(err)
	}
	talk := func(c io.ReadWriter, say string) {
		t.Helper()
		if _, err := io.WriteString(c, say); err != nil {
			t.Fatal(err)
		}
		b := make([]byte, 4)
		if _, err := io.ReadFull(c, b); err != nil || string(b) != strings.ToUpper(say) {
			t.Fatalf("heard %q, %v", b, err)
		}
	}
	talk(nic, "wire")
	talk(agent, "port")
	tcp, err := p.DialPort(ctx, g, 80)
	if err != nil {
		t.Fatal(err)
	}
	talk(tcp, "page")
	_, err = p.DialPort(ctx, g, 81)
	if err == nil || err.Error() != `dialing port 81 of machine "web@1": connection refused` {
		t.Errorf("a closed port: %v", err)
	}
	if err := p.Destroy(ctx, g); err != nil {
		t.Fatal(err)
	}
	if _, err := tcp.Read(make([]byte, 1)); err == nil {
		t.Error("a connection outlived its machine")
	}
}

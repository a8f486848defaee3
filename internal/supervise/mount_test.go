// SPDX-License-Identifier: Apache-2.0

package supervise

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/pkg/sftp"

	"github.com/labfile/lab/internal/guest/agentapi"
	"github.com/labfile/lab/internal/lab"
)

// mounting makes the machine's agent one that mounts: it reads the file "name" of every folder
// and keeps it until the stream ends. What refuse returns is its answer.
func (v *vm) mounting(refuse func(agentapi.Folder) error) (mounted chan string) {
	mounted = make(chan string, 10)
	v.mu.Lock()
	defer v.mu.Unlock()
	v.streams = func(c net.Conn) {
		h, err := agentapi.Accept(c)
		if err != nil {
			return // the agent died, or the supervisor gave up
		}
		if h.Kind == agentapi.Control { // the clock's keeper
			if agentapi.Answer(c, nil) == nil {
				_ = agentapi.Serve(c, func(agentapi.Request) agentapi.Response {
					return agentapi.Response{Hello: &agentapi.Hello{}}
				})
			}
			return
		}
		if h.Kind == agentapi.Cache { // as an agent of an earlier lab does
			_ = agentapi.Answer(c, errors.New("no such stream"))
			return
		}
		if h.Kind != agentapi.Mount || h.Folder == nil {
			v.t.Errorf("a stream for %+v", h)
			return
		}
		reason := refuse(*h.Folder)
		if err := agentapi.Answer(c, reason); err != nil || reason != nil {
			return
		}
		client, err := sftp.NewClientPipe(c, c)
		if err != nil {
			return
		}
		f, err := client.Open("/name")
		if err != nil {
			v.t.Error(err)
			return
		}
		b, err := io.ReadAll(f)
		if err != nil {
			v.t.Error(err)
		}
		mounted <- h.Folder.Path + " has " + string(b)
		_ = client.Wait()
	}
	return mounted
}

func named(t *testing.T, name string) string {
	t.Helper()
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "name"), []byte(name), 0o644); err != nil {
		t.Fatal(err)
	}
	return dir
}

// TestMounts serves folders to an agent that refuses first and starts anew later, and
// then to that of a machine that the supervisor's predecessor had.
func TestMounts(t *testing.T) {
	d := testDirs(t)
	_, c := run(t, d, nil)
	ctx := testContext(t)
	v := boot(t, d, "db", 1, 10)
	no := errors.New("the machine has no bob")
	var asked []agentapi.Folder
	mounted := v.mounting(func(f agentapi.Folder) error {
		asked = append(asked, f)
		if len(asked) == 1 {
			return no
		}
		return nil
	})
	if _, err := c.Plug(ctx, v.machine()); err != nil {
		t.Fatal(err)
	}
	src, out := named(t, "src"), named(t, "out")
	mounts := []Mount{{From: src, To: "/src", Owner: "bob"}, {From: out, To: "/out", Writable: true, Owner: "root"}}
	err := c.Mount(ctx, v.g, mounts)
	if want := "mounting " + src + " at /src: the machine has no bob"; err == nil || err.Error() != want {
		t.Errorf("got %v, want %s", err, want)
	}
	for range 2 { // the second time they are there already
		if err := c.Mount(ctx, v.g, mounts); err != nil {
			t.Fatal(err)
		}
	}
	have := map[string]bool{"/src has src": true, "/out has out": true}
	if diff := cmp.Diff(have, map[string]bool{<-mounted: true, <-mounted: true}); diff != "" {
		t.Error(diff)
	}
	want := []agentapi.Folder{
		{Path: "/src", Owner: "bob", Source: "host:" + src},
		{Path: "/src", Owner: "bob", Source: "host:" + src},
		{Path: "/out", Owner: "root", Source: "host:" + out, Writable: true},
	}
	if diff := cmp.Diff(want, asked); diff != "" {
		t.Error(diff)
	}
	again := v.mounting(func(agentapi.Folder) error { return nil })
	v.mu.Lock()
	v.agent() // the agent dies
	v.mu.Unlock()
	if diff := cmp.Diff(have, map[string]bool{<-again: true, <-again: true}); diff != "" {
		t.Error(diff)
	}

	old := boot(t, d, "web", 3, 11)
	seen := old.mounting(func(agentapi.Folder) error { return nil })
	m := old.machine()
	m.Mounts = mounts[1:]
	if _, err := c.Plug(ctx, m); err != nil {
		t.Fatal(err)
	}
	if got := <-seen; got != "/out has out" {
		t.Error(got)
	}

	mute := boot(t, d, "mute", 1, 12)
	m = mute.machine()
	m.Agent = false
	if _, err := c.Plug(ctx, m); err != nil {
		t.Fatal(err)
	}
	if err := c.Mount(ctx, mute.g, mounts); !errors.Is(err, ErrNoAgent) {
		t.Error(err)
	}
}

// TestMountsWithoutAgent asks whoever can reach a guest that has no agent.
func TestMountsWithoutAgent(t *testing.T) {
	d := testDirs(t)
	v := boot(t, d, "db", 1, 10)
	refuse := true
	names := make(chan string, 1)
	_, c := run(t, d, func(cfg *Config) {
		cfg.Folder = func(ctx context.Context, g lab.Generation, f agentapi.Folder, dial func(context.Context, uint16) (net.Conn, error)) (io.ReadWriteCloser, error) {
			if refuse {
				return nil, fmt.Errorf("%s: %w", g, &agentapi.RefusedError{What: "mount", Reason: "no FUSE"})
			}
			conn, err := dial(ctx, 7) // the guest echoes there: it is one that can be reached
			if err != nil {
				return nil, err
			}
			conn.Close()
			host, guest := net.Pipe()
			go func() {
				client, err := sftp.NewClientPipe(guest, guest)
				if err != nil {
					t.Error(err)
					return
				}
				defer client.Close()
				info, err := client.Stat("/name")
				if err != nil {
					t.Error(err)
					return
				}
				names <- fmt.Sprint(f.Path, " has ", info.Name())
				_ = client.Wait()
			}()
			return host, nil
		}
	})
	ctx := testContext(t)
	m := v.machine()
	m.Agent = false
	if _, err := c.Plug(ctx, m); err != nil {
		t.Fatal(err)
	}
	mounts := []Mount{{From: named(t, "src"), To: "/src", Owner: "root"}}
	if err := c.Mount(ctx, v.g, mounts); err == nil || !strings.HasSuffix(err.Error(), " at /src: no FUSE") {
		t.Error(err)
	}
	refuse = false
	if err := c.Mount(ctx, v.g, mounts); err != nil {
		t.Fatal(err)
	}
	if got := <-names; got != "/src has name" {
		t.Error(got)
	}
}

// TestMountsWithinMounts has a guest that starts again mount the outer folder first, also
// if that takes a few attempts.
func TestMountsWithinMounts(t *testing.T) {
	d := testDirs(t)
	_, c := run(t, d, nil)
	ctx := testContext(t)
	v := boot(t, d, "db", 1, 10)
	mounted := v.mounting(func(agentapi.Folder) error { return nil })
	if _, err := c.Plug(ctx, v.machine()); err != nil {
		t.Fatal(err)
	}
	mounts := []Mount{
		{From: named(t, "outer"), To: "/srv", Owner: "root"},
		{From: named(t, "inner"), To: "/srv/in", Owner: "root"},
		{From: named(t, "other"), To: "/srv-other", Owner: "root"},
	}
	if err := c.Mount(ctx, v.g, mounts); err != nil {
		t.Fatal(err)
	}
	for range mounts {
		<-mounted
	}
	var (
		mu      sync.Mutex
		refused int
		order   []string
	)
	again := v.mounting(func(f agentapi.Folder) error {
		mu.Lock()
		defer mu.Unlock()
		if refused++; f.Path == "/srv" && refused < 5 {
			return errors.New("not yet")
		}
		order = append(order, f.Path)
		return nil
	})
	v.mu.Lock()
	v.agent()
	v.mu.Unlock()
	for range mounts {
		<-again
	}
	mu.Lock()
	defer mu.Unlock()
	if outer, inner := slices.Index(order, "/srv"), slices.Index(order, "/srv/in"); outer < 0 || inner < outer {
		t.Errorf("mounted in the order %q", order)
	}
}

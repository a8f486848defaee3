// SPDX-License-Identifier: Apache-2.0

//go:build linux

package agent

import (
	"errors"
	"net"
	"os"
	"sync"
	"testing"

	"github.com/labfile/lab/internal/guest/agentapi"
)

func TestOwnerOf(t *testing.T) {
	a, _ := newAgent(t, map[string]string{
		"etc/passwd": "root:x:0:0:root:/root:/bin/sh\nwww:x:33:34::/var/www:/bin/false\n",
		"etc/group":  "root:x:0:\nadm:x:4:www\n",
	}, refusing{})
	for owner, want := range map[string][2]uint32{
		"": {0, 0}, "root": {0, 0}, "www": {33, 34}, "www:adm": {33, 4}, "1000": {1000, 1000}, "1000:1001": {1000, 1001}, "www:7": {33, 7},
	} {
		uid, gid, err := a.ownerOf(owner)
		if got := [2]uint32{uid, gid}; got != want || err != nil {
			t.Errorf("%q is %v, %v; want %v", owner, got, err, want)
		}
	}
	for owner, want := range map[string]string{
		"bob": "the machine has no bob in /etc/passwd", "www:wheel": "the machine has no wheel in /etc/group",
	} {
		if _, _, err := a.ownerOf(owner); err == nil || err.Error() != want {
			t.Errorf("%q: got %v, want %s", owner, err, want)
		}
	}
}

// TestFolderRefused tells the host why a folder is not mounted.
func TestFolderRefused(t *testing.T) {
	a, _ := newAgent(t, map[string]string{"etc/passwd": "root:x:0:0:root:/root:/bin/sh\n"}, refusing{})
	refused := func(f agentapi.Folder, want string) {
		t.Helper()
		host, guest := net.Pipe()
		defer host.Close()
		var wg sync.WaitGroup
		wg.Go(func() { a.Stream(t.Context(), guest) })
		defer wg.Wait()
		err := agentapi.BeginMount(t.Context(), host, f)
		var r *agentapi.RefusedError
		if !errors.As(err, &r) || r.Reason != want {
			t.Errorf("%+v: got %v, want %s", f, err, want)
		}
	}
	refused(agentapi.Folder{Path: "/src"}, "folders of the host cannot be mounted here")
	a.Folders = []string{"false"}
	refused(agentapi.Folder{}, "no folder was named")
	refused(agentapi.Folder{Path: "src"}, "no folder was named")
	refused(agentapi.Folder{Path: "/src", Owner: "bob"}, "the machine has no bob in /etc/passwd")
}

func TestPlace(t *testing.T) {
	dir := t.TempDir()
	if err := errors.Join(os.Mkdir(dir+"/run", 0o755), os.Symlink("run", dir+"/link")); err != nil {
		t.Fatal(err)
	}
	for in, want := range map[string]string{
		dir + "/link/src/": dir + "/run/src", dir + "/run/src": dir + "/run/src", dir + "/none/src": dir + "/none/src", "/": "/",
	} {
		if got := place(in); got != want {
			t.Errorf("%s is %s, want %s", in, got, want)
		}
	}
}

// SPDX-License-Identifier: Apache-2.0

package libvirt

import (
	"context"
	"errors"
	"strings"
	"syscall"
	"testing"

	"github.com/labfile/lab/internal/lab"
	"github.com/labfile/lab/providers/libvirt/daemontest"
)

// TestWorkbench interrupts work on a volume's files: nothing of it is in the way of the next.
func TestWorkbench(t *testing.T) {
	t.Parallel()
	d := daemontest.StartRemote(t)
	r := testRemote(t, "qemu+tcp://127.0.0.1:"+d.Port+"/session", d, testDirs(t))
	files, err := r.VolumeFiles(t.Context(), webOne.Lab)
	if err != nil {
		t.Fatal(err)
	}
	v, ok := files.(volumeFiles)
	if !ok {
		t.Fatalf("the files are %T", files)
	}
	chain := []string{"db@1.qcow2", "db@2.qcow2"}
	for _, name := range chain {
		if err := v.Make(t.Context(), name, 64*lab.MiB); err != nil {
			t.Fatal(err)
		}
	}
	domains := func() string { return strings.TrimSpace(d.Virsh("list", "--all", "--name")) }

	// By the user.
	ctx, cancel := context.WithCancel(t.Context())
	err = v.bench(ctx, chain[1], chain[:1], func(workbench) error {
		cancel()
		return ctx.Err()
	})
	if !errors.Is(err, context.Canceled) || domains() != "" {
		t.Errorf("interrupted: %v, domains %q", err, domains())
	}

	// By a restart of the daemon, which forgets that the domain was to end with a connection.
	killed := func() {
		t.Helper()
		err := v.bench(t.Context(), chain[1], chain[:1], func(workbench) error {
			d.Signal(syscall.SIGKILL)
			return errors.New("the daemon was killed")
		})
		if err == nil {
			t.Error("work went on without a daemon")
		}
		d.Start()
		if got := domains(); got != v.helper(chain[0]).Name {
			t.Fatalf("the domains are %q, want what was left", got)
		}
	}
	killed()
	if err := v.Commit(t.Context(), chain); err != nil {
		t.Errorf("after a restart: %v", err)
	}
	killed()
	for _, name := range chain {
		if err := v.Remove(t.Context(), name); err != nil {
			t.Error(err)
		}
	}
	if left, err := v.List(t.Context()); domains() != "" || len(left) > 0 || err != nil {
		t.Errorf("left: domains %q, files %q, %v", domains(), left, err)
	}
}

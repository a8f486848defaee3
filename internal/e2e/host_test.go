// SPDX-License-Identifier: Apache-2.0

//go:build e2e

package e2e

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"
)

// TestBadInput feeds lab what it must refuse; no machine comes of any of it.
func TestBadInput(t *testing.T) {
	eachUser(t, func(t *testing.T, w *world) {
		s := w.site(t, one)
		before := s.ok("box", "list")
		s.write("Labfile", "lab: one\nmachines:\n  m:\n    box: builtin/tiny\n    memroy: 1GiB\n    ports: [99999]\n")
		s.fails(3, []string{
			"Labfile:5:5: ", `"memroy"`, `did you mean "memory"`,
			"Labfile:6:13: ", "99999",
		}, "up")
		s.fails(3, []string{"memroy"}, "validate")

		s.write("Labfile", "lab: one\nmachines: {m: {box: builtin/tiyn}}\n")
		s.fails(3, []string{"Labfile:2:21: ", "builtin/tiyn", "builtin/tiny"}, "up")

		s.write("Labfile", "lab: one\nmachines: {m: {box: ./none.qcow2}}\n")
		s.fails(1, []string{"none.qcow2"}, "up")

		s.write("disk.raw", strings.Repeat("\x00", 1<<20))
		sum := "sha256:" + strings.Repeat("0", 64)
		s.fails(1, []string{"sha256:", "lab: hint: "}, "box", "add", "--checksum", sum, "bad", "disk.raw")
		s.write("Labfile", "lab: one\nboxes: {b: {from: ./disk.raw, checksum: '"+sum+"'}}\nmachines: {m: {box: b}}\n")
		s.fails(1, []string{"sha256:"}, "up")

		for name, disk := range hostile(filepath.Join(s.dir, "Labfile")) {
			s.write(name, string(disk))
			s.fails(1, []string{"lab: error: ", name}, "box", "add", "bad", name)
			s.write("Labfile", "lab: one\nmachines: {m: {box: ./"+name+"}}\n")
			s.fails(1, []string{"lab: error: ", name}, "up")
		}
		s.equal("the store, with nothing that was refused", s.ok("box", "list"), before)
		s.ok("box", "verify")
		s.nothingLeft()
	})
}

// hostile are disks that would harm whoever opened them. The layout is that of
// QEMU's docs/interop/qcow2.txt.
func hostile(secret string) map[string][]byte {
	image := func(change func(h []byte)) []byte {
		h := make([]byte, 4*65536)
		copy(h, "QFI\xfb")
		be := binary.BigEndian
		be.PutUint32(h[4:], 3)        // version
		be.PutUint32(h[20:], 16)      // cluster bits
		be.PutUint64(h[24:], 1<<20)   // size
		be.PutUint32(h[36:], 1)       // L1 entries
		be.PutUint64(h[40:], 2*65536) // L1 table
		be.PutUint64(h[48:], 65536)   // refcount table
		be.PutUint32(h[56:], 1)       // its clusters
		be.PutUint32(h[96:], 4)       // refcount order
		be.PutUint32(h[100:], 104)    // header length
		change(h)
		return h
	}
	backing := func(name string) []byte {
		return image(func(h []byte) {
			binary.BigEndian.PutUint64(h[8:], 1024)
			binary.BigEndian.PutUint32(h[16:], uint32(len(name)))
			copy(h[1024:], name)
		})
	}
	return map[string][]byte{
		"backing.qcow2": backing(secret),
		"json.qcow2":    backing(`json:{"driver":"file","filename":"` + secret + `"}`),
		"data.qcow2":    image(func(h []byte) { h[79] |= 1 << 2 }),
		"unknown.qcow2": image(func(h []byte) { h[72] |= 1 << 7 }),
		"crypt.qcow2":   image(func(h []byte) { h[35] = 2 }),
		"huge.qcow2":    image(func(h []byte) { binary.BigEndian.PutUint64(h[24:], 1<<60) }),
		"short.qcow2":   image(func([]byte) {})[:40],
	}
}

// TestPortTaken meets a host port that somebody else has.
func TestPortTaken(t *testing.T) {
	eachUser(t, func(t *testing.T, w *world) {
		l := listen(t)
		defer l.Close()
		port := l.Addr().(*net.TCPAddr).Port
		s := w.site(t, one+fmt.Sprintf("    ports: [\"%d:80\"]\n", port))
		s.fails(1, []string{"lab: error: ", fmt.Sprint(port), "lab: hint: "}, "up")
		l.Close()
		s.ok("up")
		m := s.machine("m")
		if m.State != "ready" || len(m.Ports) != 1 || m.Ports[0].Host != port {
			t.Errorf("after the port was free: %+v", m)
		}
	})
}

// listened counts the ports that listen has tried.
var listened atomic.Int32

// listen takes a port that neither the kernel nor another test gives to anybody, so that
// it is free again after the listener was closed.
func listen(t *testing.T) net.Listener {
	t.Helper()
	b, err := os.ReadFile("/proc/sys/net/ipv4/ip_local_port_range")
	if err != nil {
		t.Fatal(err)
	}
	var low int
	if _, err := fmt.Sscan(string(b), &low); err != nil {
		t.Fatal(err)
	}
	low -= os.Getpid() % 1000 * 10 // other test runs begin elsewhere
	for {
		port := low - int(listened.Add(1))
		if port < 1024 {
			t.Fatal("no port is free")
		}
		if l, err := net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", port)); err == nil {
			return l
		}
	}
}

// TestHost tries lab on hosts that lack something.
func TestHost(t *testing.T) {
	eachUser(t, func(t *testing.T, w *world) {
		s := w.site(t, one)
		bin := filepath.Join(s.dir, "bin")
		if err := os.Mkdir(bin, 0o755); err != nil {
			t.Fatal(err)
		}
		path := []string{"PATH=" + bin}
		fresh := append([]string{"XDG_DATA_HOME=" + filepath.Join(s.dir, "data")}, path...)

		s.failed(s.startWith(path, "", "up").end(), 5, "lab: error: ", "qemu-system-x86_64", "lab: hint: ")
		doctor := s.startWith(path, "", "doctor").end()
		if doctor.code == 0 || !strings.Contains(doctor.stdout, "qemu-system-x86") {
			t.Errorf("doctor without QEMU: %s", doctor)
		}
		s.failed(s.startWith(fresh, "", "box", "build", "builtin/tiny").end(), 5, "lab: error: ", "mmdebstrap", "lab: hint: ")

		old := "#!/bin/sh\necho 'QEMU emulator version 6.0.1 (Debian 1:6.0+dfsg)'\n"
		for _, name := range []string{"qemu-system-x86_64", "qemu-img"} {
			if err := os.Chmod(s.write("bin/"+name, old), 0o755); err != nil {
				t.Fatal(err)
			}
		}
		s.failed(s.startWith(path, "", "up").end(), 5, "lab: error: ", "6.0.1", "7.2", "lab: hint: ")
		s.nothingLeft()

		s.ok("doctor")
	})
}

// TestNoUserNamespaces builds a box as a user who may not make user namespaces,
// and as one who has no subordinate ids.
func TestNoUserNamespaces(t *testing.T) {
	w := ordinary(t)
	s := w.site(t, one)
	fresh := []string{"XDG_DATA_HOME=" + filepath.Join(s.dir, "data")}
	for _, tt := range []struct {
		name, limit string
		uid         int
		want        string
	}{
		// Inside a user namespace of its own, everybody may lower the limit;
		// the namespace in which the user is not root takes the last one.
		{"no namespaces", "1", w.uid(), "user namespaces"},
		{"no subordinate ids", "100", 54321, "/etc/subuid"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			ctx, cancel := context.WithTimeout(context.Background(), patience)
			defer cancel()
			script := `echo ` + tt.limit + ` > /proc/sys/user/max_user_namespaces && exec unshare --user --map-user ` +
				fmt.Sprint(tt.uid) + ` "$@"`
			cmd := s.command(ctx, fresh, "unshare", "--user", "--map-root-user", "sh", "-c", script,
				"sh", labBinary, "box", "build", "builtin/tiny")
			var out bytes.Buffer
			cmd.Stdout, cmd.Stderr = &out, &out
			_ = cmd.Run() // the exit code says it
			if code := cmd.ProcessState.ExitCode(); code != 5 || !strings.Contains(out.String(), tt.want) || !strings.Contains(out.String(), "lab: hint: ") {
				t.Errorf("exit %d\n%s", code, out.String())
			}
		})
	}
}

// TestFullDisk has too little space to begin, and runs out of it in the middle of a birth.
func TestFullDisk(t *testing.T) {
	eachUser(t, func(t *testing.T, w *world) {
		s := w.site(t, one)
		labs := filepath.Join(w.data(), "labs")
		for size, want := range map[string]string{
			"8k": "8KiB of disk are free in " + labs, "64k": "64KiB of disk are free in " + labs, // refused at once
			"904k": "no space left on device", // enough to begin with
		} {
			// A user namespace lets everybody mount a file system of their own.
			script := fmt.Sprintf(`mkdir -p "$1" && mount -t tmpfs -o size=%s none "$1" && shift || exit 99
				"$@" up; code=$?
				"$@" destroy --yes >&2 || echo "destroy: exit $?"
				exit $code`, size)
			ctx, cancel := context.WithTimeout(context.Background(), 3*time.Minute)
			cmd := s.command(ctx, nil, "unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script, "sh", labs, labBinary)
			var out bytes.Buffer
			cmd.Stdout, cmd.Stderr = &out, &out
			_ = cmd.Run() // the exit code says it
			cancel()
			if code := cmd.ProcessState.ExitCode(); code != 1 || !strings.Contains(out.String(), want) {
				t.Errorf("with %s of space: exit %d, want 1 and %q\n%s", size, code, want, out.String())
			}
			if strings.Contains(out.String(), "destroy: exit") {
				t.Errorf("with %s of space, destroy did not work:\n%s", size, out.String())
			}
			s.nothingLeft()
		}
	})
}

// SPDX-License-Identifier: Apache-2.0

//go:build e2e

package e2e

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/labfile/lab/internal/drift"
	"github.com/labfile/lab/internal/drift/ext4"
)

// baked is a lab whose machine has three steps; %s is the last one.
const baked = `lab: baked
machines:
  m:
    box: builtin/tiny
    provision:
      - shell: |
          echo 'app:x:1000:1000::/home:/bin/sh' >>/etc/passwd
          echo 'app:x:1000:' >>/etc/group
          echo noise >/var/log/noise.log; echo secret >/root/.ash_history; echo x >/tmp/x
      - file: {from: web, to: /srv/app, owner: "app:app", mode: "0640"}
      - shell: %s
`

// TestBake bakes steps, changes them, and looks into the images from outside.
func TestBake(t *testing.T) {
	eachUser(t, func(t *testing.T, w *world) {
		s := w.site(t, fmt.Sprintf(baked, "echo first >/etc/step"))
		if err := os.MkdirAll(filepath.Join(s.dir, "web", "sub"), 0o755); err != nil {
			t.Fatal(err)
		}
		s.write("web/page", "hello\n")
		s.write("web/sub/more", "more\n")
		if err := w.own(filepath.Join(s.dir, "web")); err != nil {
			t.Fatal(err)
		}

		// Interrupted, it leaves no machine; what it baked stays.
		s.interrupted(syscall.SIGINT, 4*time.Second, "bake")
		s.nothingLeft()

		s.ok("up")
		s.equal("content", s.ok("exec", "m", "--", "sh", "-c", "cat /srv/app/page /srv/app/sub/more /etc/step"), "hello\nmore\nfirst\n")
		s.equal("owner and mode", s.ok("exec", "m", "--", "stat", "-c", "%u:%g %a %n", "/srv/app", "/srv/app/sub", "/srv/app/page"),
			"1000:1000 750 /srv/app\n1000:1000 750 /srv/app/sub\n1000:1000 640 /srv/app/page\n")
		s.noTraces("m")

		// Only what changed is baked again.
		s.write("Labfile", fmt.Sprintf(baked, "echo second >/etc/step"))
		s.fails(2, nil, "plan")
		r := s.lab("bake", "--json")
		var got struct {
			Images []struct{ Baked int }
		}
		if err := json.Unmarshal([]byte(r.stdout), &got); err != nil || len(got.Images) != 1 || got.Images[0].Baked != 1 {
			t.Errorf("after a change of the last step: %v %+v\n%s", err, got, r)
		}
		s.equal("bake again", s.ok("bake", "--json"), strings.Replace(r.stdout, `"baked": 1`, `"baked": 0`, 1))

		// No machine was born from that layer yet: gc leaves it, and says so.
		if r := s.lab("gc"); r.code != 0 || !strings.Contains(r.stderr, `1 baked layer that no generation is made of: `) {
			t.Errorf("gc with a layer to spare: %s", r)
		}

		// A step that fails says where it stands and what it printed; the machine stays.
		s.write("Labfile", fmt.Sprintf(baked, "echo told; exit 7"))
		s.fails(1, []string{"generation 1 stays", "Labfile:11:", "provision step 3 of 3", "exit code 7", "| told"}, "up", "--yes")
		s.equal("state", s.machine("m").State, "ready")
		s.equal("generation", s.ok("exec", "m", "--", "cat", "/etc/step"), "first\n")
	})
}

// noTraces looks into the image that a machine was born from, without any guest.
func (s *site) noTraces(name string) {
	s.Helper()
	var record struct {
		Data struct {
			Box    string
			Layers []struct{ Key string }
		}
		Type, Machine string
	}
	for line := range strings.Lines(string(read(s, filepath.Join(s.w.data(), "labs", string(s.id), "ledger.jsonl")))) {
		one := record
		one.Data.Layers = nil
		if err := json.Unmarshal([]byte(line), &one); err == nil && one.Type == "machine.create" && one.Machine == name {
			record = one
		}
	}
	if len(record.Data.Layers) != 3 {
		s.Fatalf("the machine was born from %+v", record)
	}
	layers := []drift.Layer{s.boxDisk(record.Data.Box)}
	for _, l := range record.Data.Layers {
		disks, _ := filepath.Glob(filepath.Join(s.w.data(), "layers", strings.TrimPrefix(l.Key, "sha256:"), "*.qcow2"))
		if len(disks) != 1 {
			s.Fatalf("layer %s has disks %v", l.Key, disks)
		}
		layers = append(layers, drift.Layer{Path: disks[0], Format: "qcow2"})
	}
	for n := 2; n <= len(layers); n++ { // every layer is an image of its own
		chain, err := drift.OpenChain(layers[:n])
		if err != nil {
			s.Fatal(err)
		}
		view, err := chain.View(n)
		if err != nil {
			s.Fatal(err)
		}
		fs, err := ext4.Open(view, view.Size())
		if err != nil {
			s.Fatal(err)
		}
		for _, path := range []string{
			"etc/dropbear/dropbear_ed25519_host_key", "etc/ssh/ssh_host_ed25519_key", "var/lib/lab-agent/identity.json",
			"root/.ssh/authorized_keys", "root/.ash_history", "tmp/x", "etc/resolv.conf",
		} {
			if _, err := fs.Lookup(path); err == nil {
				s.Errorf("layer %d has /%s", n-1, path)
			}
		}
		for path, want := range map[string]string{"etc/machine-id": "", "etc/hostname": "localhost\n", "var/log/noise.log": ""} {
			i, err := fs.Lookup(path)
			if err != nil {
				s.Errorf("layer %d: /%s: %v", n-1, path, err)
				continue
			}
			if b, err := fs.ReadFile(i, 1<<20); err != nil || string(b) != want {
				s.Errorf("layer %d: /%s is %q (%v)", n-1, path, b, err)
			}
		}
		chain.Close()
	}
}

// boxDisk finds a box's disk in the store: the layer of its manifest that is a disk.
func (s *site) boxDisk(digest string) drift.Layer {
	s.Helper()
	blob := func(d string) string {
		return filepath.Join(s.w.data(), "boxes", "blobs", "sha256", strings.TrimPrefix(d, "sha256:"))
	}
	var manifest struct {
		Config struct{ Digest string }
		Layers []struct {
			Digest, MediaType string
		}
	}
	if err := json.Unmarshal(read(s, blob(digest)), &manifest); err != nil {
		s.Fatal(err)
	}
	var config struct{ Format string }
	if err := json.Unmarshal(read(s, blob(manifest.Config.Digest)), &config); err != nil {
		s.Fatal(err)
	}
	for _, l := range manifest.Layers {
		if strings.Contains(l.MediaType, "disk") {
			return drift.Layer{Path: blob(l.Digest), Format: config.Format}
		}
	}
	s.Fatalf("box %s has no disk: %+v", digest, manifest)
	return drift.Layer{}
}

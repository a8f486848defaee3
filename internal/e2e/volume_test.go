// SPDX-License-Identifier: Apache-2.0

//go:build e2e

package e2e

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// stored is a lab whose machine has data that outlives it.
const stored = `lab: stored
machines:
  db:
    box: builtin/tiny
    volumes:
      - {name: data, size: 64MiB, mount: /srv/data, owner: "100:101", mode: "0750"}
      - {name: a-name-too-long-for-a-serial-number, size: 16MiB, mount: /srv/long}
      - {name: pages, size: 16MiB, mount: /srv/www}
`

// TestVolumes follows the data through everything that ends machines.
func TestVolumes(t *testing.T) {
	s := ordinary(t).site(t, stored)
	liveVolumes(s, stored)
	s.nothingLeft()
}

// liveVolumes goes through the life of volumes with a lab of the Labfile stored, and
// destroys it.
func liveVolumes(s *site, stored string) {
	s.ok("up")
	look := func() string { return s.ok("exec", "db", "--", "cat /srv/data/file") }
	owner := func() string { return s.ok("exec", "db", "--", "stat -c %u:%g:%a /srv/data") }
	s.equal("owner and mode", owner(), "100:101:750\n")
	s.ok("exec", "db", "--", "echo one > /srv/data/file; chmod 0700 /srv/data; grep -q /srv/long /proc/mounts")

	// A new volume holds what the image has at its place, and nothing of mke2fs.
	pages := func() string { return s.ok("exec", "db", "--", "ls -A /srv/www; stat -c %u:%g:%a /srv/www /srv/long") }
	s.equal("pages", pages(), "cgi-bin\nindex.html\n0:0:755\n0:0:755\n")
	s.ok("exec", "db", "--", "rm -r /srv/www/*")

	// The guest restarts by itself, and has its volumes before anybody asks.
	boot := func() string { return s.lab("exec", "db", "--", "cat /proc/sys/kernel/random/boot_id").stdout }
	before := boot()
	s.lab("exec", "db", "--", "reboot")
	s.wait("the guest is back", func() bool { b := boot(); return b != "" && b != before })
	s.equal("after a restart", look(), "one\n")
	s.equal("what was emptied stays so", pages(), "0:0:755\n0:0:755\n")

	s.ok("replace", "db", "--yes")
	s.equal("after a replacement", look(), "one\n")
	s.equal("a root folder that was changed by hand", owner(), "100:101:700\n")
	if got := s.volume("data").numbers(); got != "1" {
		s.Errorf("snapshots after a replacement: %s", got)
	}
	s.ok("exec", "db", "--", "echo two > /srv/data/file")
	s.ok("rollback", "db")
	s.equal("after a rollback", look(), "two\n")
	if got := s.volume("data").numbers(); got != "1 2" {
		s.Errorf("snapshots after a rollback: %s", got)
	}

	s.fails(1, []string{"in use by db@3", "lab stop db"}, "volume", "restore", "data@1")
	s.fails(1, []string{"in use by db@3"}, "volume", "rm", "data", "--yes")
	s.ok("volume", "clone", "data@1") // while the machine runs
	// A snapshot under a machine that writes: it goes on, also when it starts again.
	s.ok("exec", "db", "--", "echo live > /srv/data/file")
	s.ok("volume", "snapshot", "data")
	s.ok("exec", "db", "--", "echo later > /srv/data/file; sync")
	s.ok("volume", "clone", "data@3", "live")
	s.equal("beside the snapshot", look(), "later\n")
	s.ok("stop")
	s.ok("start")
	s.equal("after a start", look(), "later\n")
	s.ok("stop")
	s.ok("volume", "restore", "data@1")
	s.ok("start")
	s.equal("after restore", look(), "one\n")

	s.write("Labfile", strings.Replace(stored, "64MiB", "96MiB", 1))
	s.ok("up", "--yes")
	s.equal("after growing", look(), "one\n")
	blocks := s.ok("exec", "db", "--", "df -k /srv/data | awk 'END {print ($2 > 80000)}'")
	s.equal("the file system has grown", blocks, "1\n")
	s.write("Labfile", strings.Replace(stored, "64MiB", "48MiB", 1))
	s.fails(1, []string{"volume data has 96MiB and cannot shrink to 48MiB"}, "plan")

	// The lab goes, the data stays, and the next lab finds it, beside an earlier
	// state of it.
	s.ok("destroy", "--yes")
	if _, err := os.Stat(filepath.Join(s.w.data(), "labs", string(s.id), "volumes")); err != nil {
		s.Error(err)
	}
	if list := s.ok("list"); !strings.Contains(list, "its volumes are kept") {
		s.Errorf("lab list says nothing of the volumes:\n%s", list)
	}
	s.ok("gc")
	s.write("Labfile", strings.Replace(stored, "64MiB", "96MiB", 1)+`  old:
    box: builtin/tiny
    volumes:
      - {name: data-1, size: 64MiB, mount: /srv/data, read_only: true}
      - {name: live, size: 64MiB, mount: /srv/live, read_only: true}
`)
	s.ok("up")
	s.equal("after destroy", look(), "one\n")
	s.equal("an earlier state", s.ok("exec", "old", "--", "cat /srv/data/file; touch /srv/data/x 2>/dev/null || echo read-only"), "one\nread-only\n")
	s.equal("a snapshot that was taken under a writer", s.ok("exec", "old", "--", "cat /srv/live/file"), "live\n")

	// What reads keeps nobody from writing, and sees what is newer at its next start.
	s.write("Labfile", strings.Replace(stored, "64MiB", "96MiB", 1)+`  reader:
    box: builtin/tiny
    depends_on: [db]
    volumes:
      - {name: data, size: 96MiB, mount: /srv/data, read_only: true}
`)
	s.ok("up", "--yes")
	seen := func() string { return s.ok("exec", "reader", "--", "cat /srv/data/file") }
	s.equal("beside the writer", seen(), "one\n")
	s.ok("exec", "db", "--", "echo newer > /srv/data/file")
	s.ok("replace", "db", "--yes")
	s.equal("the writer's next generation", look(), "newer\n")
	s.equal("a reader that runs on", seen(), "one\n")
	s.ok("stop", "db")
	s.ok("replace", "reader", "--yes")
	s.ok("start", "db")
	s.equal("a reader's next generation", seen(), "newer\n")
	s.ok("exec", "db", "--", "echo newest > /srv/data/file")
	s.ok("volume", "export", "data", "data.raw")
	s.fails(1, []string{"data.raw exists already"}, "volume", "export", "data", "data.raw")
	s.equal("after an export", look(), "newest\n")
	s.fails(1, []string{"in use by"}, "volume", "rm", "data", "--yes")

	s.ok("destroy", "--yes", "--volumes")
	s.gone = true
}

type volumeInfo struct {
	Name      string
	Snapshots []struct{ Number json.Number }
}

func (v volumeInfo) numbers() string {
	var all []string
	for _, snap := range v.Snapshots {
		all = append(all, snap.Number.String())
	}
	return strings.Join(all, " ")
}

// volume returns what "lab volume list --json" says of a volume.
func (s *site) volume(name string) volumeInfo {
	s.Helper()
	var list struct{ Volumes []volumeInfo }
	if err := json.Unmarshal([]byte(s.ok("volume", "list", "--json")), &list); err != nil {
		s.Fatal(err)
	}
	for _, v := range list.Volumes {
		if v.Name == name {
			return v
		}
	}
	s.Fatalf("there is no volume %s", name)
	return volumeInfo{}
}

// SPDX-License-Identifier: Apache-2.0

//go:build e2e

package e2e

import (
	"strings"
	"syscall"
	"testing"
)

// bootLab is a machine that joins another at its first boot, and starts a service and a
// program that goes on.
const bootLab = `lab: boots
machines:
  db: {box: builtin/tiny}
  web:
    box: builtin/tiny
    depends_on: [db]
    volumes: [{name: data, size: 16MiB, mount: /srv/data}]
    boot:
      - shell: {script: join.sh, args: ["a b"]}
        timeout: 1m
      - shell: |
          ping -c 1 db
          httpd -p 8080 -h /srv/data
          sleep 100000 &
          echo "$HOME $(id -u)" >/etc/second
    ready:
      - http: {port: 8080, path: /joined}
        timeout: 1m
`

const joinScript = `#!/bin/sh -e
echo joining
echo "$LAB_NAME $LAB_ROLE $LAB_MACHINE@$LAB_GENERATION as $1 of $(hostname)$(cat)" >>/srv/data/joined
`

// TestBootSteps runs scripts at the first boot of each generation, and at no other.
func TestBootSteps(t *testing.T) {
	s := ordinary(t).site(t, bootLab)
	s.write("join.sh", joinScript)

	// lab is killed while a step runs: that generation never was ready.
	s.write("Labfile", strings.Replace(bootLab, "ping -c 1 db", "echo now it hangs; sleep 1000", 1))
	p := s.start("up")
	s.wait("the second step runs", func() bool { return strings.Contains(p.stderr.String(), "now it hangs") })
	p.signal(syscall.SIGKILL)
	p.end()
	if r := s.lab("plan"); r.code != 2 || !strings.Contains(r.stdout, "generation 1 was interrupted before it was ready") {
		t.Errorf("after lab was killed: %s", r)
	}
	s.write("Labfile", bootLab)
	r := s.lab("up", "--yes")
	if r.code != 0 || !strings.Contains(r.stderr, "web: joining\n") || !strings.Contains(r.stderr, "web: ran boot step 2 of 2: shell ping -c 1 db …") {
		t.Fatal(r)
	}
	joined := "boots web web@1 as a b of web\nboots web web@2 as a b of web\n"
	s.equal("what the steps left", s.ok("exec", "web", "--", "cat /srv/data/joined /etc/second; grep -qx sleep /proc/[0-9]*/comm && echo goes on"), joined+"/root 0\ngoes on\n")

	s.ok("stop", "web")
	s.write("Labfile", strings.Replace(bootLab, "    ready:\n      - http: {port: 8080, path: /joined}\n        timeout: 1m\n", "", 1)) // no step starts it again
	s.ok("up")
	s.equal("after another boot", s.ok("exec", "web", "--", "cat /srv/data/joined"), joined)

	// A changed script makes the next generation, and one that fails takes over from nothing.
	s.write("Labfile", bootLab)
	s.write("join.sh", joinScript+"echo told; exit 7\n")
	if r := s.lab("plan"); r.code != 2 || !strings.Contains(r.stdout, "boot changed: step 1: file join.sh") {
		t.Errorf("the plan for a changed script: %s", r)
	}
	s.fails(1, []string{"generation 3 did not take over, generation 2 stays: ", "Labfile:9:9: boot step 1 of 2 (shell join.sh): exit code 7", "| told"}, "up", "--yes")
	if m := s.machine("web"); m.Generation != 2 || m.State != "ready" {
		t.Errorf("after a step that failed: %+v", m)
	}
	if out := s.ok("history", "web"); !strings.Contains(out, "web@2: ran 2 boot steps in ") || strings.Contains(out, "web@3: ran ") {
		t.Errorf("the history says\n%s", out)
	}
	s.ok("destroy", "--yes", "--volumes")
	s.gone = true
	s.nothingLeft()
}

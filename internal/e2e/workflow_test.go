// SPDX-License-Identifier: Apache-2.0

//go:build e2e

package e2e

import (
	"fmt"
	"strings"
	"testing"
)

// workflow is the lab of docs/workflow.md, with the text of its page.
func workflow(page string) string {
	return fmt.Sprintf(`lab: workflow
machines:
  web:
    box: builtin/tiny
    provision:
      - file: {to: /srv/www/page.txt, content: "%s\n"}
    ports: ["0:80"]
    ready:
      - http: {port: 80, path: /page.txt}
        timeout: 1m
    replace: {strategy: blue-green, drain: 2s}
    on_shell: taint
  client:
    box: builtin/tiny
    depends_on: [web]
`, page)
}

// TestWorkflow goes the way of docs/workflow.md: change, plan, replace under load,
// break, refuse, fix by hand, see the drift, put it into the Labfile, roll back.
func TestWorkflow(t *testing.T) {
	s := ordinary(t).site(t, workflow("one"))
	s.ok("up")
	port := s.machine("web").Ports[0].Host
	s.equal("the client's view", s.ok("exec", "client", "--", "wget -qO- http://web/page.txt"), "one\n")

	// A change, the plan, and a replacement that loses no request.
	s.write("Labfile", workflow("two"))
	p := s.lab("plan")
	if p.code != 2 || !strings.Contains(p.stdout, "provision changed") || !strings.Contains(p.stdout, "web") {
		s.Fatalf("the plan does not tell what changed: %s", p)
	}
	load := newHammer("/page.txt", port)
	s.wait("the old page is served", func() bool { return load.seen("one\n") > 3 })
	s.ok("up")
	s.wait("the new page is served", func() bool { return load.seen("two\n") > 3 })
	answered, failed, first := load.stop()
	s.Logf("%d requests answered during the replacement", answered)
	if failed > 0 {
		s.Errorf("%d requests failed, the first with %v", failed, first)
	}
	if m := s.machine("web"); m.Generation != 2 || m.Ports[0].Host != port {
		s.Errorf("after the replacement: %+v", m)
	}
	s.equal("the client's view", s.ok("exec", "client", "--", "wget -qO- http://web/page.txt"), "two\n")

	// A generation that does not pass its checks never takes over.
	s.write("Labfile", strings.Replace(strings.Replace(workflow("three"), "path: /page.txt", "path: /missing.txt", 1), "timeout: 1m", "timeout: 5s", 1))
	load = newHammer("/page.txt", port)
	r := s.fails(1, []string{"web", "http :80/missing.txt"}, "up")
	if _, failed, first = load.stop(); failed > 0 {
		s.Errorf("a generation that was refused cost %d requests, the first %v: %s", failed, first, r)
	}
	if load.seen("three\n") > 0 {
		s.Error("a generation that was refused answered")
	}
	if m := s.machine("web"); m.Generation != 2 || m.State != "ready" {
		s.Errorf("after a refused replacement: %+v", m)
	}
	s.write("Labfile", workflow("two"))
	s.ok("up")

	// A fix by hand taints the machine; the drift says what was done, and how the
	// Labfile would say it.
	s.ok("exec", "web", "--", "echo fixed > /srv/www/page.txt; chmod 600 /srv/www/index.html")
	d := s.lab("diff", "web")
	if d.code != 2 || !strings.Contains(d.stdout, "/srv/www/page.txt") || !strings.Contains(d.stdout, "/srv/www/index.html") {
		s.Errorf("the drift: %s", d)
	}
	steps := s.lab("diff", "web", "--as-provision")
	if steps.code != 2 || !strings.Contains(steps.stdout, "to: /srv/www/page.txt") || !strings.Contains(steps.stdout, "fixed") {
		s.Errorf("the drift as provision steps: %s", steps)
	}
	if p := s.lab("plan"); p.code != 2 || !strings.Contains(p.stdout, "tainted") {
		s.Errorf("the plan for a tainted machine: %s", p)
	}
	s.write("Labfile", workflow("fixed"))
	s.ok("up")
	if r := s.lab("diff", "web"); r.code != 0 {
		s.Errorf("a machine that was just born has drifted: %s", r)
	}

	// Back, and the Labfile's word again.
	s.ok("rollback", "web")
	s.equal("after the rollback", s.ok("exec", "client", "--", "wget -qO- http://web/page.txt"), "two\n")
	if p := s.lab("plan"); p.code != 2 || !strings.Contains(p.stdout, "rolled back") {
		s.Errorf("the plan after a rollback: %s", p)
	}
	s.ok("up")
	s.equal("after up", s.ok("exec", "client", "--", "wget -qO- http://web/page.txt"), "fixed\n")

	// The drill.
	if out := s.ok("burn", "web", "--yes"); !strings.Contains(out, "web") {
		s.Errorf("burn says %q", out)
	}
	s.equal("after the fire", s.ok("exec", "client", "--", "wget -qO- http://web/page.txt"), "fixed\n")
}

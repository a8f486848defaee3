// SPDX-License-Identifier: Apache-2.0

package cli_test

import (
	"fmt"
	"strings"
	"sync"
	"testing"
)

const answeringLab = `lab: shop
provider: memory
boxes: {own: {from: answering}}
machines:
  m:
    box: own
`

// A check's exit code says that the machine is not ready, and never becomes lab's own:
// 5 would say that this host cannot run machines, 4 that the lab is locked. Every code
// has a lab of its own, as a readiness check is tried for a second at least.
func TestNoExitCodeOfACheckIsPassedOn(t *testing.T) {
	codes := make(chan int)
	var wg sync.WaitGroup
	for range 64 {
		wg.Go(func() {
			for code := range codes {
				noExitCodeIsPassedOn(t, code)
			}
		})
	}
	for code := 1; code <= 255; code++ {
		codes <- code
	}
	close(codes)
	wg.Wait()
}

func noExitCodeIsPassedOn(t *testing.T, exit int) {
	d := newAnsweringDesk(t, answeringLab+fmt.Sprintf("    ready: [{exec: \"echo broken; exit %d\", timeout: 1s}]\n", exit))
	defer func() { _, _, _ = d.run("destroy", "--yes") }()
	how := [][]string{{"-q"}, {"--json"}, {"-q", "--json"}, {}}[exit%4]
	try := func(want int, says string, args ...string) {
		t.Helper()
		code, out, errOut := d.run(append(how[:len(how):len(how)], args...)...)
		if code != want || !strings.Contains(out+errOut, says) {
			t.Errorf("lab %v: exit code %d, want %d and %q\n%s%s", args, code, want, says, out, errOut)
		}
	}
	says := fmt.Sprintf("lab: error: 1 machine failed\n  m is not ready: check exec \"echo broken; exit %d\" failed for 1s: ", exit)
	try(1, says, "up") // why it failed at last is the code, or that a busy host took a second to log in
	d.write("Labfile", answeringLab+fmt.Sprintf("checks: [{on: m, run: \"exit %d\"}]\n", exit))
	says = fmt.Sprintf("\n  m is not ready: 1 of 1 checks failed: run exit %d: exit-status: wanted \"0\", found \"%d\"\nlab: hint: ", exit, exit)
	try(1, says, "replace", "m")
	try(2, fmt.Sprint(exit), "verify")
	// What the user runs is another matter.
	if code, _, errOut := d.run("-q", "exec", "m", "--", fmt.Sprintf("exit %d", exit)); code != exit || errOut != "" {
		t.Errorf("lab exec: exit code %d, want %d\n%s", code, exit, errOut)
	}
}

// SPDX-License-Identifier: Apache-2.0

package bake

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/labfile/lab/internal/fsutil"
	"github.com/labfile/lab/internal/lab"
)

// maxScript is how large a script of a boot step may be. Each lab keeps its own.
const maxScript = 4 * lab.MiB

// BootSteps returns steps with the digests by which they are known again. It reads their
// scripts, which are relative to dir, and nothing else. Errors: *InputError.
func BootSteps(dir string, steps []lab.BootStep) ([]lab.BootStep, error) {
	out := slices.Clone(steps)
	for i := range out {
		b := &out[i]
		text, err := canonical(b.Provision)
		if b.Script != "" && err == nil {
			_, b.File, err = ReadScript(dir, b.Script)
		}
		if err != nil {
			return nil, &InputError{Key: "boot", Place: b.Place, Step: b.Provision, Err: err}
		}
		b.Step = sum("step", text)
	}
	return out, nil
}

// ReadScript returns the content of a script, relative to dir, and its digest.
func ReadScript(dir, script string) (content []byte, digest string, err error) {
	f, err := fsutil.OpenRegular(onHost(dir, script))
	if err != nil {
		return nil, "", err
	}
	defer f.Close()
	if content, err = io.ReadAll(io.LimitReader(f, int64(maxScript)+1)); err != nil {
		return nil, "", err
	}
	if len(content) > int(maxScript) {
		return nil, "", fmt.Errorf("%s is larger than %s; let provision put it into the image", script, maxScript)
	}
	return content, ScriptDigest(content), nil
}

// ScriptDigest is the digest of a script's content.
func ScriptDigest(content []byte) string {
	h := sha256.Sum256(content)
	return digestOf(h[:])
}

// timeoutError says that a step took too long.
type timeoutError struct{ limit time.Duration }

func (e *timeoutError) Error() string { return "it did not end within " + brief(e.limit) }

// brief is a duration without the units that are zero at its end.
func brief(d time.Duration) string {
	text := d.String()
	for _, zero := range []string{"0s", "0m"} { // 1h0m0s is 1h
		if cut := strings.TrimSuffix(text, zero); strings.HasSuffix(cut, "m") || strings.HasSuffix(cut, "h") {
			text = cut
		}
	}
	return text
}

// Hint is the next step.
func (e *timeoutError) Hint() string {
	return "\"timeout:\" beside \"shell:\" gives it more time; what it leaves running must not hold its output: \"COMMAND >/dev/null 2>&1 &\""
}

// endTime is how much longer than lab the guest waits before it ends a step: until then, it
// is ended from outside if it can be.
const endTime = time.Second

// Boot runs a boot step, for no longer than it may take: its script, or else the program
// that it has itself. Lines are told as by Run. Errors:
// *FailedError, which holds ctx's cause if that has ended.
func (m *Machine) Boot(ctx context.Context, b lab.BootStep, script []byte, out func(line string)) error {
	program := []byte(b.Shell)
	if b.Script != "" {
		program = script
	}
	late := &timeoutError{b.Timeout}
	limit, cancel := context.WithTimeoutCause(ctx, b.Timeout, late)
	defer cancel()
	lines := &lines{tell: out}
	err := m.execute(limit, b.Provision, program, b.Timeout+endTime, lines)
	lines.end()
	if err == nil {
		return nil
	}
	if ctx.Err() == nil && errors.Is(context.Cause(limit), late) {
		err = late
	}
	return lines.failed(err)
}

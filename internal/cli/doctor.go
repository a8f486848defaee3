// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"context"
	"errors"

	"github.com/urfave/cli/v2"

	"github.com/labfile/lab/boxes/build"
	"github.com/labfile/lab/internal/engine"
	"github.com/labfile/lab/internal/proxy"
	"github.com/labfile/lab/internal/ui"
	"github.com/labfile/lab/providers"
)

// doctorJSON is the schema of "lab doctor --json".
type doctorJSON struct {
	Provider string        `json:"provider"`
	Capable  bool          `json:"capable"`
	Findings []findingJSON `json:"findings"`
}

type findingJSON struct {
	Topic  string          `json:"topic"`
	Level  providers.Level `json:"level"` // "ok", "warning" or "error"
	Detail string          `json:"detail"`
	Cure   string          `json:"cure,omitempty"`
}

func (a *app) doctorCommand() *command {
	return &command{
		name: "doctor", group: groupLook, reports: true,
		short: "check what this host needs to run machines",
		long: `Checks everything that machines and boxes need, and names the command that
cures what is missing. Exit code 5 if machines cannot run.`,
		flags: []cli.Flag{
			&cli.StringFlag{Name: "provider", Usage: "check for the provider `NAME` (default: " + engine.DefaultProvider + "; LAB_PROVIDER)"},
			&cli.StringFlag{Name: "uri", Usage: "of provider libvirt: check the daemon at `URI` (LAB_LIBVIRT_URI)"},
		},
		examples: []string{
			"lab doctor", "check this host",
		},
		run: func(ctx context.Context, _ request) error {
			h, err := a.host()
			if err != nil {
				return err
			}
			provider := a.setting("provider", "LAB_PROVIDER")
			if provider == "" {
				provider = engine.DefaultProvider
			}
			findings, err := h.Doctor(ctx, provider, a.uri(provider))
			if err != nil {
				return err
			}
			findings = append(findings, builds(ctx), a.proxies())
			out := doctorJSON{Provider: provider, Capable: true, Findings: []findingJSON{}}
			for _, f := range findings {
				out.Capable = out.Capable && f.Level != providers.LevelError
				out.Findings = append(out.Findings, findingJSON(f))
			}
			if a.asJSON {
				err = ui.JSON(a.Out, out)
			} else {
				err = ui.Findings(a.Out, findings, a.ui.OutPage())
			}
			if err == nil && !out.Capable {
				return exitCode(ExitIncapable)
			}
			return err
		},
	}
}

// builds says whether the built-in boxes can be built here. Other boxes work all
// the same, so it is no error if not.
func builds(ctx context.Context) providers.Finding {
	f := providers.Finding{Topic: "built-in boxes", Level: providers.LevelOK, Detail: "can be built here"}
	err := build.Check(ctx)
	if err == nil {
		return f
	}
	f.Level, f.Detail, f.Cure = providers.LevelWarning, err.Error(), build.Alternatives
	var lacks *build.IncapableError
	if errors.As(err, &lacks) && lacks.Cure != "" {
		f.Cure = lacks.Cure
	}
	return f
}

// proxies says which proxy settings guests would inherit. Those that cannot be understood
// are no error: most labs want none.
func (a *app) proxies() providers.Finding {
	f := providers.Finding{Topic: "proxy", Level: providers.LevelOK, Detail: "the environment has none"}
	s, err := proxy.FromEnv(a.Getenv)
	var bad *proxy.EnvError
	switch {
	case errors.As(err, &bad):
		f.Level, f.Detail, f.Cure = providers.LevelWarning, err.Error(), bad.Hint()
	case !s.Empty():
		f.Detail = "guests with \"proxy: inherit\" get " + s.String()
	}
	return f
}

package daemon

import (
	"errors"
	"fmt"
	"path"
	"strings"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/mutate"

	"drafter/api"
	"drafter/network"
)

// program is what a run changes of its image's program. It is a part of the key of a template, whose
// other keys stay as they are without it.
type program struct {
	Entrypoint  []string `json:",omitempty"`
	Dir         string   `json:",omitempty"`
	User        string   `json:",omitempty"`
	Interactive bool     `json:",omitempty"` // it waits until somebody runs it
	Egress      []string `json:",omitempty"`
}

func programOf(r api.Run) program {
	return program{Entrypoint: r.Entrypoint, Dir: r.Dir, User: r.User, Interactive: r.Stdin || r.TTY, Egress: r.Egress}
}

// checkProgram refuses a program that no VM can have.
func checkProgram(r *api.Run) error {
	for _, text := range append(append([]string{r.Dir, r.User}, r.Entrypoint...), r.Command...) {
		if strings.ContainsRune(text, 0) {
			return errors.New("a program's words, directory and user have no NUL bytes")
		}
	}
	if r.Dir != "" && !path.IsAbs(r.Dir) {
		return fmt.Errorf("the working directory %q is not absolute", r.Dir)
	}
	if err := network.CheckEgress(r.Egress); err != nil {
		return fmt.Errorf("egress: %w", err)
	}
	return nil
}

// configure returns the image with the program of a template.
func (k templateKey) configure(image v1.Image) (v1.Image, error) {
	file, err := image.ConfigFile()
	if err != nil {
		return nil, fmt.Errorf("read image config: %w", err)
	}
	file = file.DeepCopy()
	c := &file.Config
	if len(k.Entrypoint) > 0 {
		c.Entrypoint, c.Cmd = k.Entrypoint, nil
	}
	if len(k.Command) > 0 {
		c.Cmd = k.Command
	}
	if k.Dir != "" {
		c.WorkingDir = k.Dir
	}
	if k.User != "" {
		c.User = k.User
	}
	if image, err = mutate.ConfigFile(image, file); err != nil {
		return nil, fmt.Errorf("change the image's program: %w", err)
	}
	return image, nil
}

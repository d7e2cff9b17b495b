# The worker's image: one static program, docker compose, git.
#
#   docker compose build orchestrator   everything is built in containers
#   make image                          Go programs are built on this machine, for
#                                       where containers reach no module proxy

ARG BUILD_IMAGE=golang:1.26-bookworm
ARG BASE_IMAGE=debian:bookworm-slim

FROM ${BUILD_IMAGE} AS build
WORKDIR /src
COPY . .
ARG VERSION=unknown
# PREBUILT=1 takes what `make build` has put into bin/.
ARG PREBUILT=
RUN mkdir /out && if [ "$PREBUILT" = 1 ]; then \
      cp bin/mm-orchestrator bin/docker-compose /out/; \
    else \
      CGO_ENABLED=0 go build -trimpath -buildvcs=false -ldflags "-s -w -X main.version=$VERSION" \
        -o /out/mm-orchestrator ./cmd/mm-orchestrator && \
      CGO_ENABLED=0 go build -C tools/compose -trimpath -buildvcs=false \
        -ldflags "-s -w -X github.com/docker/compose/v5/internal.Version=$(cd tools/compose && go list -m -f '{{.Version}}' github.com/docker/compose/v5)" \
        -o /out/docker-compose github.com/docker/compose/v5/cmd; \
    fi

FROM ${BASE_IMAGE}
# The first line spares the package lists where a base has all of it.
RUN command -v git && test -e /etc/ssl/certs/ca-certificates.crt \
 || { apt-get update && apt-get install -y --no-install-recommends git ca-certificates && rm -rf /var/lib/apt/lists/*; }
# The workspace is a mount that belongs to another user: without this git
# refuses to look at it. The image has no other repository.
RUN git config --system --add safe.directory '*'
COPY --from=build /out/ /usr/local/bin/
# Also as a plugin, for plans that call `docker compose` where a docker command
# line is added to this image.
RUN mkdir -p /usr/local/lib/docker/cli-plugins \
 && ln -s /usr/local/bin/docker-compose /usr/local/lib/docker/cli-plugins/docker-compose
ENTRYPOINT ["mm-orchestrator"]
CMD ["worker"]

//! Connections: accepted within limits, and let finish when the server is told to stop.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use flmm::Grounder;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::GracefulShutdown;
use hyper_util::service::TowerToHyperService;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;

use crate::app::{self, App};
use crate::engine::Engine;
use crate::observe;
use crate::settings::{Limits, Settings};

/// Why a server did not start, or ended.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The address cannot be listened at.
    #[error("cannot listen at {addr}: {source}")]
    Listen {
        /// The address.
        addr: SocketAddr,
        /// The operating system's reason.
        source: std::io::Error,
    },
    /// The model cannot be opened.
    #[error(transparent)]
    Model(#[from] flmm::Error),
    /// The runtime or the metrics cannot be started.
    #[error("cannot start: {0}")]
    Start(String),
}

/// A model by its name.
pub struct Named {
    /// What clients call it.
    pub name: String,
    /// The model.
    pub grounder: Grounder,
}

/// A router with a model that is loaded, for tests and for those who serve it themselves.
///
/// # Errors
/// [`ServeError::Start`] if metrics cannot be counted, [`ServeError::Model`] if no thread can be had.
pub fn app(settings: Settings, model: Named) -> Result<Router, ServeError> {
    let (app, engine) = parts(settings)?;
    engine.start(model.name, model.grounder)?;
    Ok(app::router(app))
}

/// A router whose model is still being loaded, and for ever.
///
/// # Errors
/// [`ServeError::Start`] if metrics cannot be counted.
pub fn app_without_model(settings: Settings) -> Result<Router, ServeError> {
    Ok(app::router(parts(settings)?.0))
}

fn parts(settings: Settings) -> Result<(App, Engine), ServeError> {
    let metrics = observe::recorder().map_err(|error| ServeError::Start(error.to_string()))?;
    let engine = Engine::new(settings.workers, settings.prefix_cache_bytes, settings.queue_image_tokens);
    Ok((App::new(settings, engine.clone(), metrics), engine))
}

/// Serves until SIGINT or SIGTERM. Listens at once and opens the model meanwhile; what was accepted is finished within
/// [`Settings::grace`].
///
/// `listening` is told the address, whose port the operating system has chosen where 0 was asked for.
///
/// # Errors
/// [`ServeError`] if the address cannot be listened at or the model cannot be opened.
pub fn serve<E: From<ServeError> + Send + 'static>(
    settings: Settings,
    open: impl FnOnce() -> Result<Named, E> + Send + 'static,
    listening: impl FnOnce(SocketAddr),
) -> Result<(), E> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .max_blocking_threads(16)
        .thread_name("http")
        .enable_all()
        .build()
        .map_err(|error| ServeError::Start(error.to_string()))?;
    let served = runtime.block_on(run(settings, open, listening));
    // A model that is being opened, or a client that never reads, is not waited for.
    runtime.shutdown_background();
    served
}

async fn run<E: From<ServeError> + Send + 'static>(
    settings: Settings,
    open: impl FnOnce() -> Result<Named, E> + Send + 'static,
    listening: impl FnOnce(SocketAddr),
) -> Result<(), E> {
    let (app, engine) = parts(settings.clone())?;
    let addr = settings.addr;
    let listen = |source| ServeError::Listen { addr, source };
    let listener = TcpListener::bind(addr).await.map_err(listen)?;
    listening(listener.local_addr().map_err(listen)?);
    tokio::spawn(upkeep(app.clone()));
    let loaded = {
        let engine = engine.clone();
        tokio::task::spawn_blocking(move || {
            let model = open()?;
            engine.start(model.name, model.grounder).map_err(|error| E::from(ServeError::from(error)))
        })
    };
    let stop = stop_signal().map_err(|error| ServeError::Start(error.to_string()))?;
    let router = app::router(app);
    let graceful = GracefulShutdown::new();
    let threads = {
        let accept = accept(&listener, &router, &graceful, &settings.limits);
        tokio::pin!(accept, stop, loaded);
        let started = tokio::select! {
            () = &mut accept => return Ok(()),
            () = &mut stop => {
                tracing::info!("stopping before the model was loaded");
                return Ok(());
            }
            started = &mut loaded => started,
        };
        let threads = started.map_err(|error| ServeError::Start(error.to_string()))??;
        tracing::info!("ready");
        tokio::select! {
            () = &mut accept => {}
            () = &mut stop => {}
        }
        threads
    };
    drop(listener);
    tracing::info!("stopping: what was accepted is finished");
    engine.close();
    let finished = async {
        graceful.shutdown().await;
        // What nobody waits for any more may still be computed.
        tokio::task::spawn_blocking(move || threads.into_iter().try_for_each(|thread| thread.join())).await
    };
    if tokio::time::timeout(settings.grace, finished).await.is_err() {
        tracing::warn!("some requests were not finished in time");
    }
    Ok(())
}

/// Accepts connections for ever.
async fn accept(listener: &TcpListener, router: &Router, graceful: &GracefulShutdown, limits: &Limits) {
    let connections = Arc::new(Semaphore::new(limits.connections.min(Semaphore::MAX_PERMITS)));
    loop {
        // Beyond the limit, connections wait in the operating system's queue.
        let Ok(permit) = connections.clone().acquire_owned().await else { return };
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                // Too many open files, or a client that went already: neither lasts.
                tracing::warn!(%error, "a connection was not accepted");
                tokio::time::sleep(Duration::from_millis(50)).await;
                continue;
            }
        };
        // Small events are to arrive as they are sent.
        let _ = stream.set_nodelay(true);
        give_up_on_deaf(&stream, limits.deaf_time);
        let mut http = hyper::server::conn::http1::Builder::new();
        http.timer(TokioTimer::new())
            .header_read_timeout(limits.head_time)
            .max_headers(limits.headers)
            .max_buf_size(limits.head_bytes.max(8 << 10));
        let service = TowerToHyperService::new(router.clone());
        let connection = graceful.watch(http.serve_connection(TokioIo::new(stream), service));
        tokio::spawn(async move {
            if let Err(error) = connection.await {
                tracing::debug!(%error, "a connection ended early");
            }
            drop(permit);
        });
    }
}

/// Lets the operating system, where it can, close a connection whose client takes nothing of what is sent to it.
fn give_up_on_deaf(stream: &TcpStream, time: Duration) {
    #[cfg(target_os = "linux")]
    if let Err(error) = socket2::SockRef::from(stream).set_tcp_user_timeout(Some(time)) {
        tracing::debug!(%error, "a client that reads nothing will be kept");
    }
    #[cfg(not(target_os = "linux"))]
    let _ = (stream, time);
}

/// Keeps the samples of times from piling up between two looks at the metrics.
async fn upkeep(app: App) {
    loop {
        tokio::time::sleep(Duration::from_secs(5)).await;
        app.metrics().run_upkeep();
    }
}

/// Resolves at the first SIGINT or SIGTERM.
fn stop_signal() -> std::io::Result<impl Future<Output = ()>> {
    #[cfg(unix)]
    {
        use tokio::signal::unix::{SignalKind, signal};
        let mut terminate = signal(SignalKind::terminate())?;
        let mut interrupt = signal(SignalKind::interrupt())?;
        Ok(async move {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
        })
    }
    #[cfg(not(unix))]
    Ok(async {
        let _ = tokio::signal::ctrl_c().await;
    })
}

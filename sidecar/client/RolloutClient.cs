using System.Diagnostics;
using Grpc.Core;
using Grpc.Health.V1;
using Grpc.Net.Client;

namespace Rollout.Client;

/// <summary>
/// A connection to one sidecar. Safe for concurrent calls from any thread. The connection is made by the first call.
/// </summary>
/// <remarks>
/// Every call has a timeout, which is also the deadline after which the sidecar drops the call's samples or update. By default, calls
/// that generate or score tokens get <see cref="DefaultWorkTimeout"/> and all others <see cref="DefaultControlTimeout"/>;
/// <see cref="Timeout.InfiniteTimeSpan"/> means no deadline. Failures are <see cref="RolloutException"/>s with the sidecar's message;
/// a cancelled token gives <see cref="OperationCanceledException"/>.
/// </remarks>
public sealed partial class RolloutClient : IAsyncDisposable
{
    /// <summary>Default timeout of Generate, Stream, GenerateBatch and Score.</summary>
    public static readonly TimeSpan DefaultWorkTimeout = TimeSpan.FromHours(1);

    /// <summary>Default timeout of all other calls.</summary>
    public static readonly TimeSpan DefaultControlTimeout = TimeSpan.FromSeconds(30);

    private static readonly TimeSpan s_readyPoll = TimeSpan.FromMilliseconds(50);

    private readonly RolloutAddress _address;
    private readonly GrpcChannel _channel;
    private readonly V1.RolloutService.RolloutServiceClient _rollout;
    private readonly V1.ControlService.ControlServiceClient _control;
    private readonly Health.HealthClient _health;

    private RolloutClient(RolloutAddress address)
    {
        _address = address;
        _channel = GrpcChannel.ForAddress(address.Uri, new GrpcChannelOptions
        {
            HttpHandler = Handler(address),
            DisposeHttpClient = true,
            // Replies are as large as the requested samples, so their size is not limited: the sidecar is trusted.
            MaxReceiveMessageSize = null,
        });
        _rollout = new V1.RolloutService.RolloutServiceClient(_channel);
        _control = new V1.ControlService.ControlServiceClient(_channel);
        Weights = new V1.WeightsService.WeightsServiceClient(_channel);
        _health = new Health.HealthClient(_channel);
    }

    /// <summary>As given to <see cref="Connect"/>.</summary>
    public string Address => _address.Text;

    internal V1.WeightsService.WeightsServiceClient Weights { get; }

    /// <param name="address"><c>unix:/path</c>, <c>unix:///path</c> or <c>http://host:port</c>.</param>
    /// <exception cref="ArgumentException">It is none of these.</exception>
    public static RolloutClient Connect(string address) => new(RolloutAddress.Parse(address));

    /// <summary>Returns once the sidecar has loaded its model and serves; also waits for it to start listening.</summary>
    /// <exception cref="RolloutTimeoutException">It did not within <paramref name="timeout"/>; the message has its last answer.</exception>
    public async Task WaitUntilReadyAsync(TimeSpan timeout, CancellationToken cancellationToken = default)
    {
        Stopwatch clock = Stopwatch.StartNew();
        while (true)
        {
            cancellationToken.ThrowIfCancellationRequested();
            TimeSpan left = timeout - clock.Elapsed;
            string answer;
            RpcException? error = null;
            try
            {
                // One call to a sidecar that accepts the connection but does not answer must not use up the whole timeout.
                TimeSpan call = TimeSpan.FromSeconds(Math.Clamp(left.TotalSeconds, 0.1, 5));
                HealthCheckResponse reply = await _health.CheckAsync(new HealthCheckRequest(), Options(call, cancellationToken));
                if (reply.Status == HealthCheckResponse.Types.ServingStatus.Serving)
                    return;
                answer = reply.Status.ToString();
            }
            catch (RpcException e) when (!cancellationToken.IsCancellationRequested)
            {
                if (e.StatusCode == StatusCode.Unimplemented)
                    throw new RolloutException($"{Address} has no health service: is it a sidecar?", e) { StatusCode = e.StatusCode };
                answer = $"{e.StatusCode}, {e.Status.Detail}";
                error = e;
            }
            catch (RpcException)
            {
                throw new OperationCanceledException(cancellationToken);
            }

            if (clock.Elapsed + s_readyPoll >= timeout)
            {
                throw new RolloutTimeoutException(
                    $"the sidecar at {Address} was not ready after {timeout.TotalSeconds:0.###} s; its last answer: {answer}", error)
                {
                    StatusCode = StatusCode.DeadlineExceeded,
                };
            }

            await Task.Delay(s_readyPoll, cancellationToken);
        }
    }

    /// <summary>Ends calls in progress and closes the connection.</summary>
    public ValueTask DisposeAsync()
    {
        _channel.Dispose();
        return ValueTask.CompletedTask;
    }

    private static readonly TimeSpan s_clockSlack = TimeSpan.FromMilliseconds(20);

    internal static CallOptions Options(TimeSpan timeout, CancellationToken cancellationToken) =>
        new(deadline: timeout == Timeout.InfiniteTimeSpan ? null : DateTime.UtcNow + timeout, cancellationToken: cancellationToken);

    /// <summary>Makes one unary call, turning gRPC's errors into this library's.</summary>
    private static async Task<T> CallAsync<T>(
        Func<CallOptions, AsyncUnaryCall<T>> call, TimeSpan timeout, CancellationToken cancellationToken)
    {
        CallOptions options = Options(timeout, cancellationToken);
        try
        {
            using AsyncUnaryCall<T> made = call(options);
            return await made.ResponseAsync;
        }
        catch (RpcException e)
        {
            throw Translate(e, options);
        }
    }

    private static Exception Translate(RpcException error, CallOptions options, string requestId = "")
    {
        if (options.CancellationToken.IsCancellationRequested)
            return new OperationCanceledException("the call was cancelled", error, options.CancellationToken);

        // Both sides watch the deadline. If the server sees it pass first, it resets the stream, and gRPC reports only that.
        bool broken = error.StatusCode is StatusCode.Unavailable or StatusCode.Cancelled;
        if (broken && DateTime.UtcNow + s_clockSlack >= options.Deadline)
            return RolloutException.From(StatusCode.DeadlineExceeded, "", requestId, error);
        return RolloutException.From(error, requestId);
    }

    private static SocketsHttpHandler Handler(RolloutAddress address) => new()
    {
        ConnectCallback = async (_, cancellationToken) => await V1.SidecarSocket.ConnectAsync(address.EndPoint, cancellationToken),
        UseProxy = false,
        // More calls at once than one HTTP/2 connection carries (100 on Kestrel) open another instead of waiting.
        EnableMultipleHttp2Connections = true,
        PooledConnectionIdleTimeout = Timeout.InfiniteTimeSpan,
        // A machine that has crashed is noticed within a minute, not when TCP times out.
        KeepAlivePingDelay = TimeSpan.FromSeconds(30),
        KeepAlivePingTimeout = TimeSpan.FromSeconds(30),
        KeepAlivePingPolicy = HttpKeepAlivePingPolicy.WithActiveRequests,
    };
}

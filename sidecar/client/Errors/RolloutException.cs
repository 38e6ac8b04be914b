using Grpc.Core;

namespace Rollout.Client;

/// <summary>A call to the sidecar failed. Kinds that a caller may want to distinguish have their own classes.</summary>
public class RolloutException(string message, Exception? inner = null) : Exception(message, inner)
{
    /// <summary>gRPC's status, <see cref="StatusCode.Unknown"/> where the client itself detected the error.</summary>
    public StatusCode StatusCode { get; init; } = StatusCode.Unknown;

    /// <summary>The group the error is about, or "".</summary>
    public string RequestId { get; init; } = "";

    internal static RolloutException From(RpcException error, string requestId = "") =>
        From(error.StatusCode, error.Status.Detail, requestId, error);

    internal static RolloutException From(StatusCode code, string detail, string requestId = "", Exception? inner = null)
    {
        string about = requestId.Length > 0 ? $"request '{requestId}': {detail}" : detail;
        return code switch
        {
            StatusCode.InvalidArgument or StatusCode.AlreadyExists => new RolloutRequestException(about, inner)
            {
                StatusCode = code,
                RequestId = requestId,
                Problems = detail,
            },
            StatusCode.ResourceExhausted => new RolloutBusyException(about, inner) { StatusCode = code, RequestId = requestId },
            StatusCode.FailedPrecondition => new RolloutStateException(about, inner) { StatusCode = code, RequestId = requestId },
            StatusCode.Unavailable => new RolloutUnavailableException(about, inner) { StatusCode = code, RequestId = requestId },
            StatusCode.DeadlineExceeded => new RolloutTimeoutException(
                detail.Length > 0 ? about : "the call took longer than its timeout", inner)
            {
                StatusCode = code,
                RequestId = requestId,
            },
            _ => new RolloutException($"{code}: {about}", inner) { StatusCode = code, RequestId = requestId },
        };
    }
}

/// <summary>The request is invalid. Sending it again cannot succeed.</summary>
public sealed class RolloutRequestException(string message, Exception? inner = null) : RolloutException(message, inner)
{
    /// <summary>Everything wrong with the request, as the server's text: "field: message; field: message".</summary>
    public string Problems { get; init; } = "";
}

/// <summary>The sidecar has no room now; the same request may be accepted later.</summary>
public sealed class RolloutBusyException(string message, Exception? inner = null) : RolloutException(message, inner);

/// <summary>The call is not allowed in the state the engine is in; the message names the state.</summary>
public sealed class RolloutStateException(string message, Exception? inner = null) : RolloutException(message, inner);

/// <summary>The sidecar cannot be reached, went away during the call, or its engine has failed and must be restarted.</summary>
public sealed class RolloutUnavailableException(string message, Exception? inner = null) : RolloutException(message, inner);

/// <summary>The call took longer than its timeout; the sidecar drops its samples or update.</summary>
public sealed class RolloutTimeoutException(string message, Exception? inner = null) : RolloutException(message, inner);

using Google.Protobuf;
using Grpc.Core;
using Grpc.Core.Interceptors;

namespace Rollout.Server.Grpc;

/// <summary>
/// Converts exceptions of every call to the right status, so that the services only throw, and refuses requests with unknown fields.
/// </summary>
internal sealed class ErrorInterceptor(ILogger<ErrorInterceptor> logger) : Interceptor
{
    public override async Task<TResponse> UnaryServerHandler<TRequest, TResponse>(
        TRequest request, ServerCallContext context, UnaryServerMethod<TRequest, TResponse> continuation)
    {
        try
        {
            if (request is IMessage message) UnknownFields.Refuse(message);
            return await continuation(request, context);
        }
        catch (Exception exception)
        {
            throw Translate(exception, context);
        }
    }

    public override async Task ServerStreamingServerHandler<TRequest, TResponse>(
        TRequest request,
        IServerStreamWriter<TResponse> responseStream,
        ServerCallContext context,
        ServerStreamingServerMethod<TRequest, TResponse> continuation)
    {
        try
        {
            await continuation(request, responseStream, context);
        }
        catch (Exception exception)
        {
            throw Translate(exception, context);
        }
    }

    public override async Task DuplexStreamingServerHandler<TRequest, TResponse>(
        IAsyncStreamReader<TRequest> requestStream,
        IServerStreamWriter<TResponse> responseStream,
        ServerCallContext context,
        DuplexStreamingServerMethod<TRequest, TResponse> continuation)
    {
        try
        {
            await continuation(requestStream, responseStream, context);
        }
        catch (Exception exception)
        {
            throw Translate(exception, context);
        }
    }

    private RpcException Translate(Exception exception, ServerCallContext context)
    {
        // A disconnected client makes reads and writes fail in many ways; all of them are reported the same.
        if (context.CancellationToken.IsCancellationRequested)
            return new RpcException(new Status(StatusCode.Cancelled, "the client has disconnected"));
        if (Errors.ToStatus(exception) is { } status)
        {
            string text = StatusText.Capped(status.Detail);
            Log.Refused(logger, context.Method, status.StatusCode.ToString(), text);
            return new RpcException(new Status(status.StatusCode, text));
        }

        Log.Unexpected(logger, context.Method, exception);
        return new RpcException(new Status(StatusCode.Internal, "an error inside the server; its log says more"));
    }
}

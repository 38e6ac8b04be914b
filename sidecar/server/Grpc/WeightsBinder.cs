using Grpc.Core;
using Rollout.V1;

namespace Rollout.Server.Grpc;

/// <summary>Binds the weights service like the generated code, except that <see cref="ChunkMarshaller"/> parses updates.</summary>
internal sealed class WeightsBinder(ServiceBinderBase binder) : ServiceBinderBase
{
    /// <summary>Found by gRPC through <see cref="BindServiceMethodAttribute"/>; the service is null then.</summary>
    public static void Bind(ServiceBinderBase binder, WeightsService.WeightsServiceBase? service)
        => WeightsService.BindService(new WeightsBinder(binder), service);

    public override void AddMethod<TRequest, TResponse>(
        Method<TRequest, TResponse> method, UnaryServerMethod<TRequest, TResponse>? handler)
        => binder.AddMethod(method, handler);

    public override void AddMethod<TRequest, TResponse>(
        Method<TRequest, TResponse> method, DuplexStreamingServerMethod<TRequest, TResponse>? handler)
    {
        if (method is Method<UpdateRequest, TResponse> update)
            binder.AddMethod(ReadingChunks(update), handler as DuplexStreamingServerMethod<UpdateRequest, TResponse>);
        else
            binder.AddMethod(method, handler);
    }

    private static Method<UpdateRequest, TResponse> ReadingChunks<TResponse>(Method<UpdateRequest, TResponse> method)
        => new(method.Type, method.ServiceName, method.Name, ChunkMarshaller.Create(method.RequestMarshaller), method.ResponseMarshaller);
}

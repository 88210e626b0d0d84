// A certified OpenID provider for tests: oidc-provider, with its own pages for whoever signs in.
//   node provider.mjs PORT REDIRECT_URI     ada is of the clinic until somebody asks for /dismiss, bob of nobody's
import { createServer } from 'node:http'
import { createRequire } from 'node:module'
import { pathToFileURL } from 'node:url'

const require = createRequire(`${process.cwd()}/`)
const { default: Provider } = await import(pathToFileURL(require.resolve('oidc-provider')).href)
const [port, redirect] = process.argv.slice(2)
let members = ['ada']
const groups = (id) => (members.includes(id) ? ['clinic:reader'] : ['visitors'])

const provider = new Provider(`http://127.0.0.1:${port}`, {
  clients: [{ client_id: 'console', client_secret: 'the secret of: the/console', redirect_uris: [redirect] }],
  findAccount: (_, id) => ({ accountId: id, claims: () => ({ sub: id, groups: groups(id) }) }),
  scopes: ['openid', 'groups'],
  claims: { openid: ['sub'], groups: ['groups'] },
  pkce: { required: () => true },
  features: {
    devInteractions: { enabled: true },
    resourceIndicators: {
      enabled: true,
      getResourceServerInfo: () => ({ scope: 'openid groups', audience: 'connito', accessTokenFormat: 'jwt' }),
    },
  },
  extraTokenClaims: (_, token) => ({ groups: groups(token.accountId) }),
})
const answer = provider.callback()
createServer((request, response) => {
  if (request.url !== '/dismiss') return answer(request, response)
  members = []
  response.end()
}).listen(Number(port), '127.0.0.1', () => console.log('ready'))
